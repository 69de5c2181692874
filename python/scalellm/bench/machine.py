"""The machine a result was measured on; a figure without it means nothing."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# Those of a CPU's flags that decide how fast a model runs on it.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, system; JSON-ready, without names of hosts or users."""
    cpu = _cpu_fields()
    load_1m = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_1m_before": load_1m,
    }


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() if affinity is None else len(affinity(0))


def _cpu_fields() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]
