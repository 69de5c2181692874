"""How many cores there are to compute with."""

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = _CGROUPS) -> int:
    """Cores this process may run on, and has the time of: a container with 2 cores' time on a
    machine of 64 computes with 2 threads, since more would only wait for each other."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limit = cgroup_cpu_limit(cgroups)
    return cores if limit is None else max(1, min(cores, int(limit)))


def cgroup_cpu_limit(cgroups: Path = _CGROUPS) -> float | None:
    """Cores' worth of time that a control group allows, version 2 or 1; None without a limit."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroups / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroups / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None
