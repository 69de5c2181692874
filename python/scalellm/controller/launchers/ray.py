"""Engines as actors of a Ray cluster: Ray finds the place, and is in no token's path.

    root ──child──> ray_replica.py ──Ray──> RayEngine, an actor on some node ──child──> engine
    gateway ─────────────── TCP, to the address that ray_replica.py wrote down ──────────┘

Nothing here imports Ray, whose driver has threads: the root stays small, and forks.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scalellm.controller.child import PYTHON, Command
from scalellm.controller.launchers.launcher import Engine
from scalellm.errors import ConfigError, ServeError

_PROBE_S = 60.0
_REPLICA = "scalellm.controller.launchers.ray_replica"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what Ray may give away of it."""

    name: str
    cpus: float
    gpus: float


class RayLauncher:
    """`nodes`: the cluster as it was found before anything was started."""

    def __init__(self, folder: Path, address: str, nodes: Sequence[Node]) -> None:
        self._folder = folder
        self._ray_address = address
        self._nodes = tuple(nodes)

    @property
    def cores(self) -> int:
        return max(1, sum(int(node.cpus) for node in self._nodes))

    @property
    def gpus(self) -> int | None:
        """An actor sees those that Ray has given it."""
        return None

    @property
    def most_threads(self) -> int:
        return max(1, *(int(node.cpus) for node in self._nodes))

    def model(self, asked: str, path: Path, /) -> str:
        """A folder must be there under the same path on every node; all else each node finds."""
        return str(path) if Path(asked).expanduser().is_dir() else asked

    def check(self, engines: Sequence[Engine]) -> None:
        """Every engine fits a node. Whether all fit at once depends on who else uses the cluster:
        those that find no place wait for one."""
        for engine in engines:
            gpus = engine.ranks if engine.is_on_gpu else 0
            cpus = gpus or engine.threads
            if any(node.cpus >= cpus and node.gpus >= gpus for node in self._nodes):
                continue
            largest = max(self._nodes, key=lambda node: (node.gpus, node.cpus))
            raise ConfigError(
                f"launcher: {engine.name} needs {cpus} CPUs and {gpus} GPUs in one node of the Ray "
                f"cluster; what would fit the largest, {largest.name}: {largest.cpus:g} CPUs and "
                f"{largest.gpus:g} GPUs"
            )

    def address(self, engine: Engine) -> str:
        return f"file:{self._address_file(engine)}"

    def command(self, engine: Engine) -> Command:
        given = {
            "ray_address": self._ray_address,
            "deployment": self._folder.name,
            "address_file": str(self._address_file(engine)),
            "engine": asdict(engine),
        }
        return Command((*PYTHON, _REPLICA, "--json", json.dumps(given)))

    def _address_file(self, engine: Engine) -> Path:
        return self._folder / f"{engine.name}.address"


def find_nodes(address: str) -> list[Node]:
    """The cluster's nodes, asked for in a process of its own.

    Raises ServeError when there is no cluster, ConfigError without Ray."""
    try:
        asked = subprocess.run(
            [*PYTHON, "scalellm.controller.launchers.ray_cluster", address],
            capture_output=True,
            timeout=_PROBE_S,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServeError(f"ray_address: {address} did not answer within {_PROBE_S:g} s") from None
    try:
        answer = json.loads(asked.stdout.strip().rpartition("\n")[2])
    except ValueError:
        sys.stderr.write(asked.stderr)
        raise ServeError(f"ray_address: asking {address} failed") from None
    if "missing" in answer:
        raise ConfigError("launcher: ray is not installed; `pip install scalellm[ray]`")
    if "error" in answer:
        raise ServeError(f"ray_address: no Ray cluster at {address}: {answer['error']}")
    return [Node(**node) for node in answer["nodes"]]
