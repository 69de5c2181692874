"""What `scalellm calibrate` measures, and on what. Nothing is loaded: steps' costs are made up."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scalellm.cli import calibrate
from scalellm.cli.main import main
from scalellm.config import EngineConfig
from scalellm.controller.blueprint.cost import ShapeCost, StepCost, read_calibration
from scalellm.errors import OutOfMemoryError


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, int]]:
    """The engines whose steps were measured, and beside how many others; one rank has no room."""
    found: list[tuple[EngineConfig, int]] = []

    def measure(
        config: EngineConfig, _short: bool, on_gpu: bool, neighbours: int
    ) -> tuple[ShapeCost, float]:
        assert not (on_gpu and neighbours)
        found.append((config, neighbours))
        if config.tensor_parallel_size == 1:
            raise OutOfMemoryError("the model does not fit: needs 90 GiB")
        return ShapeCost(config.tensor_parallel_size, StepCost(1.0), 8, 512, 100.0, 4096), 0.01

    monkeypatch.setattr(calibrate, "_measure", measure)
    return found


def run(folder: Path, *flags: str) -> tuple[int, Path]:
    file = folder / "costs.toml"
    return main(["calibrate", "demo", "--write", str(file), *flags]), file


def on_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(calibrate, "usable_cores", lambda: 2)
    for name, value in {"is_available": True, "device_count": count, "current_device": 0}.items():
        answer: Any = value
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)


def test_devices_are_gpus_where_engines_run_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[tuple[EngineConfig, int]]
) -> None:
    on_gpus(monkeypatch, 8)
    code, file = run(tmp_path, "--widths", "2,8", "--device", "auto")
    assert code == 0
    assert [(c.tensor_parallel_size, c.cpu_threads, beside) for c, beside in measured] == [
        (2, 2, 0),
        (8, 8, 0),
    ]
    found = read_calibration(str(file))
    assert (found.widths, found.source) == ((2, 8), "measured")
    assert "8 GPUs" in found.note


def test_more_devices_than_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpus(monkeypatch, 4)
    assert run(tmp_path, "--widths", "1", "--devices", "8")[0] == 2
    assert "--devices: got 8, allowed: 1 to 4" in capsys.readouterr().err


@pytest.mark.usefixtures("measured")
def test_a_width_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpus(monkeypatch, 2)
    code, file = run(tmp_path, "--widths", "1,2")
    assert code == 0
    assert read_calibration(str(file)).widths == (2,)
    assert "# TP 1 is left out: the model does not fit" in file.read_text()


@pytest.mark.usefixtures("measured")
def test_a_model_that_fits_no_width_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, file = run(tmp_path, "--widths", "1", "--device", "cpu")
    assert (code, file.exists()) == (1, False)
    assert "the model does not fit: needs 90 GiB" in capsys.readouterr().err


def test_replicas_of_a_cpu_are_measured_beside_as_many_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[tuple[EngineConfig, int]]
) -> None:
    monkeypatch.setattr(calibrate, "usable_cores", lambda: 8)
    assert run(tmp_path, "--widths", "2,4,8", "--devices", "8", "--device", "cpu")[0] == 0
    found = [(config.tensor_parallel_size, neighbours) for config, neighbours in measured]
    assert found == [(2, 3), (4, 1), (8, 0)]
    measured.clear()
    run(tmp_path, "--widths", "2", "--devices", "8", "--device", "cpu", "--alone")
    assert [neighbours for _, neighbours in measured] == [0]
