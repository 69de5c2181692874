"""`scalellm calibrate` with real engines, one beside another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import scalellm.demo
from scalellm.bench.neighbours import busy_neighbours
from scalellm.config import EngineConfig
from scalellm.controller.blueprint.cost import read_calibration
from scalellm.controller.cores import usable_cores
from scalellm.errors import EngineError

from .supervised import children, until

DEMO = Path(scalellm.demo.__file__).parent / "model"


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
    shape = read_calibration(str(file)).shapes[1]
    assert shape.others == 1
    assert f"{shape.beside:.3f} x as long beside 1 busy devices" in ran.stdout


def test_a_neighbour_computes_until_the_end() -> None:
    before = set(children(os.getpid()))
    with busy_neighbours(EngineConfig(model="demo", model_path=DEMO, cpu_threads=1), 1):
        (started,) = set(children(os.getpid())) - before
        began_s = cpu_s(started)
        until(lambda: cpu_s(started) > began_s + 0.5, 30)
    assert started not in children(os.getpid())


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_neighbour_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    config = EngineConfig(model="nowhere", model_path=tmp_path / "nowhere")
    with pytest.raises(EngineError, match="did not start"), busy_neighbours(config, 1):
        pass
