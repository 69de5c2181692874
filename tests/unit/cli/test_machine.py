"""What doctor finds out about a machine."""

from pathlib import Path

import pytest

from scalellm.bench.floor import Ceilings
from scalellm.cli import doctor, machine
from scalellm.cli.main import main


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
    # So many bytes a second that int8 weights of Qwen3-0.6B are read in 40 ms at 0.8 of it.
    ceilings = Ceilings(18.63e9 + 1.835e9, 1e15, 1e15, "avx512", 2)
    monkeypatch.setattr(doctor, "_ceilings", lambda _cores: ceilings)
    monkeypatch.setattr(doctor, "available_cpu_bytes", lambda: 6 << 30)
    exit_code = main(["doctor", "--port", "0"])
    said = capsys.readouterr().out
    assert "avx512, 2 threads: read 20.5 GB/s" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  Qwen3-0.6B")]
    assert "int8 24.9 (40)" in line
    (line,) = [line for line in said.splitlines() if line.startswith("  Qwen3-4B")]
    assert "bf16: needs about" in line
    assert exit_code == (1 if "cannot serve yet" in said else 0)


def test_doctor_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--port", "0"])
    said = capsys.readouterr().out
    assert " GB/s, int8 " in said
    main(["doctor", "--port", "0", "--quick"])
    assert " GB/s" not in capsys.readouterr().out
