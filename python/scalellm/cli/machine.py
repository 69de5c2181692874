"""What this machine has, found without importing torch."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FEATURES = {  # as /proc/cpuinfo calls them (x86, Arm) -> as people do
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "asimddp": "dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int | None  # None where it is shared with the CPU
    driver: str


def cpu_name() -> str:
    """The processor's name as its vendor gives it."""
    for line in _lines("/proc/cpuinfo"):
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector instructions that matter here."""
    for line in _lines("/proc/cpuinfo"):
        if line.lower().startswith(("flags", "features")):
            found = set(line.partition(":")[2].split())
            return [name for flag, name in _FEATURES.items() if flag in found]
    return []


def total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpus() -> list[Gpu]:
    """NVIDIA GPUs, as nvidia-smi lists them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [  # memory is "[N/A]" where it is the system's
        Gpu(row[0], int(row[1]) << 20 if row[1].isdigit() else None, row[2])
        for row in rows
        if len(row) == 3
    ]


def package_version(name: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def free_disk_bytes(folder: Path) -> int:
    """Free bytes where `folder` is, or would be."""
    existing = next(found for found in (folder, *folder.parents) if found.exists())
    return shutil.disk_usage(existing).free


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
