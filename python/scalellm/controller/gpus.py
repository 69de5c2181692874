"""The GPUs of a host, and which replica has which."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from scalellm.config import ServeConfig
from scalellm.controller.shapes import comes_after
from scalellm.errors import ConfigError, ServeError

_DEVICES = Path("/dev")
_MADE_BY_DRIVERS = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "kfd")  # without one torch sees no GPU
_ASK = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
_ASK_S = 120.0
_SHARE_OF_AUTO = 0.45  # of a GPU's memory, as replicas of two shapes are there for a while


def torch_gpus() -> int:
    """GPUs that torch sees, as an engine's process does; asked in one, as importing it takes long.

    Raises ServeError."""
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=True,
        )
        return int(asked.stdout.split()[-1])
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [str(error)])[-1]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        reason = str(error)
    raise ServeError(f"torch could not say which GPUs there are: {reason}")


def count_gpus(
    models: Sequence[ServeConfig],
    ask: Callable[[], int] = torch_gpus,
    devices: Path = _DEVICES,
) -> int:
    """GPUs that the models' engines will find; 0 where there are none, or it makes no difference:
    a single engine of one rank takes what it finds.

    Raises ConfigError for `--device cuda` without one."""
    wanted, first = {config.engine.device for config in models}, models[0]
    has_driver = any(any(devices.glob(name)) for name in _MADE_BY_DRIVERS)
    is_single = (
        len(models) == 1
        and first.deployment.blueprint == "static"
        and first.deployment.replicas == first.engine.tensor_parallel_size == 1
        and not first.blueprint.replica
    )
    if wanted == {"cpu"} or (is_single if has_driver else "cuda" not in wanted):
        return 0
    there = ask()
    if "cuda" in wanted and not there:
        raise ConfigError("--device: got cuda, and torch sees no GPU here; allowed: cpu")
    return there


def settled(config: ServeConfig, gpus: int) -> ServeConfig:
    """With the device that `auto` is where there are so many GPUs, and, where the shape changes
    there, with the share of their memory that a replica may use.

    Raises ConfigError for a share that leaves none for the other shape."""
    engine = config.engine
    if engine.device == "auto" and gpus:
        engine = replace(engine, device="cuda")
    is_auto = config.deployment.blueprint == "auto"
    if engine.device == "cuda" and is_auto and not comes_after(config):
        share = engine.gpu_memory_utilization
        if share is not None and share > 0.5:
            raise ConfigError(
                f"--gpu-memory-utilization: got {share:g}, allowed with --blueprint auto: at most "
                f"0.5, as replicas of the old shape and of the new share each GPU during a switch; "
                f"any, with --switch after"
            )
        engine = replace(engine, gpu_memory_utilization=share or _SHARE_OF_AUTO)
    return replace(config, engine=engine)


class Gpus:
    """`count` GPUs, given to replicas: each its own while there are some, shared after that."""

    def __init__(self, count: int, first: int = 0) -> None:
        """Those from `first` on. 0: how many is not known, so every replica gets others."""
        self._used = [0.0] * count  # share of each one's memory
        self._first = self._next = first

    def untaken(self) -> "Gpus":
        """The same ones, before anybody has taken any."""
        return Gpus(len(self._used), self._first)

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
        return self._first + first
