"""Cores to compute with, under limits of both generations of control groups."""

from pathlib import Path

import pytest

from scalellm.controller.cores import cgroup_cpu_limit, usable_cores


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", None), ("150000 100000", 1.5), ("x", None), ("5 0", None), ("", None)],
)
def test_the_limit_of_a_control_group(tmp_path: Path, text: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup_cpu_limit(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", None), ("250000", 2.5)])
def test_the_limit_of_a_control_group_of_version_1(
    tmp_path: Path, quota: str, cores: float | None
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cpu_limit(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("290000", 2), ("max", 64)])
def test_a_container_counts_the_time_it_gets_not_the_cores_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(64)))
    (tmp_path / "cpu.max").write_text(f"{quota} 100000")
    assert usable_cores(tmp_path) == cores
