"""`scalellm calibrate` with real engines, one beside another."""

import subprocess
import sys
from pathlib import Path

import pytest

from scalellm.bench.neighbours import busy_neighbours
from scalellm.config import EngineConfig
from scalellm.controller.blueprint.cost import read_calibration
from scalellm.controller.cores import usable_cores
from scalellm.errors import EngineError


@pytest.mark.skipif(usable_cores() < 2, reason="needs a core for each of two engines")
def test_steps_are_measured_alone_and_beside_another_engine(tmp_path: Path) -> None:
    file = tmp_path / "costs.toml"
    command = [sys.executable, "-m", "scalellm", "calibrate", "demo", "--device", "cpu", "--short"]
    ran = subprocess.run(
        [*command, "--widths", "1", "--devices", "2", "--write", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "x as long where all others compute too" in ran.stdout
    assert read_calibration(str(file)).shapes[1].beside >= 1.0


def test_a_neighbour_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    config = EngineConfig(model="nowhere", model_path=tmp_path / "nowhere")
    with pytest.raises(EngineError, match="did not start"), busy_neighbours(config, 1):
        pass
