"""What doctor finds out about a machine."""

from pathlib import Path

import pytest

from scalellm.cli import machine
from scalellm.cli.main import main


def test_bandwidth_is_of_a_plausible_size() -> None:
    assert 1e8 < machine.read_bandwidth(1) < 1e13


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert machine.package_version("no-such-package") is None
    assert machine.package_version("pytest")


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 570.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == [machine.Gpu("NVIDIA H200", 143771 << 20, "570.1")]
    tool.write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], 580.1'\n")
    assert machine.gpus() == [machine.Gpu("NVIDIA GB10", None, "580.1")]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.free_disk_bytes(tmp_path / "a" / "b") > 0


def test_doctor_tells_what_would_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda _threads: 15e9)
    exit_code = main(["doctor", "--port", "0"])
    said = capsys.readouterr().out
    assert "15.0 GB/s" in said
    assert "Qwen3-0.6B     about  10.0 tok/s, 100 ms a token" in said
    assert exit_code == (1 if "cannot serve yet" in said else 0)
