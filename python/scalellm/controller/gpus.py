"""The GPUs of a host, and which replica has which. Nothing here asks torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from scalellm.errors import ConfigError

_DEVICES = Path("/dev")


def visible_gpus(devices: Path = _DEVICES, environment: Mapping[str, str] = os.environ) -> int:
    """NVIDIA's GPUs that a process started here sees, 0 where none can be found this way.

    `CUDA_VISIBLE_DEVICES` may hide some; what it lists of unknown ones ends the list, as for CUDA.
    """
    names = [path.name for path in devices.glob("nvidia*")] if devices.is_dir() else []
    there = sum(1 for name in names if re.fullmatch(r"nvidia\d+", name))
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return there
    seen = 0
    for entry in listed.split(","):
        name = entry.strip()
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < there):
            break
        seen += 1
    return seen


class Gpus:
    """`count` GPUs, given to replicas: each its own while there are some, shared after that."""

    def __init__(self, count: int) -> None:
        """0: how many is not known, so every replica gets others."""
        self._used = [0.0] * count  # share of each one's memory
        self._next = 0

    def take(self, name: str, ranks: int, share: float) -> int:
        """The first of the GPUs of replica `name`, whose `ranks` use `share` of the memory each.

        Raises ConfigError where that is more than there is."""
        if not self._used:
            first = self._next
            self._next += ranks
            return first
        there = len(self._used)
        if ranks > there:
            raise ConfigError(
                f"--tensor-parallel-size: {name} needs {ranks} GPUs, one for each rank; there are "
                f"{there}"
            )
        first = min(range(there - ranks + 1), key=lambda at: max(self._used[at : at + ranks]))
        for at in range(first, first + ranks):
            self._used[at] += share
        most = max(self._used[first : first + ranks])
        if most > 1 + 1e-9:  # shares as 0.1 have no exact sum
            raise ConfigError(
                f"--replicas: none of the {there} GPUs is left for {name}; fewer replicas fit, or "
                f"several on one whose --gpu-memory-utilization are at most 1 together, not "
                f"{most:g}; or --device cpu"
            )
        return first
