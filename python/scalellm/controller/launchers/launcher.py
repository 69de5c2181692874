"""The interface between a deployment's plan and what starts its engines.

    local       a process of this machine; listens on a Unix socket
    ray         a process on a node of a Ray cluster; listens on TCP, at an address in a file
    kubernetes  starts nothing: Kubernetes does, from the chart's values (kubernetes.py)

Whatever runs an engine, the root's child is a process of this machine: the engine itself, or one
that stands for it. It reports through `--status-fd`, takes the engine's signals and ends when the
engine ends, so that restarts, backoff, drains and the end with the root are the same for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scalellm.controller.child import Command


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine that may be started."""

    name: str
    number: int  # of the deployment's engines, from 0
    model: str  # as `scalellm engine` takes it
    flags: tuple[str, ...]  # every setting but --listen and --config, spelt out
    ranks: int
    threads: int  # on a CPU, of all its ranks
    is_on_gpu: bool = False  # each rank on one of its own


class Launcher(Protocol):
    """Starts engines somewhere."""

    @property
    def cores(self) -> int:
        """All that there are to divide among a deployment's replicas."""

    @property
    def gpus(self) -> int | None:
        """Those that its engines divide, 0 if none are known; None if each sees its own alone."""

    @property
    def most_threads(self) -> int:
        """Those that one engine gets without asking for a number."""

    def model(self, asked: str, path: Path, /) -> str:
        """What `scalellm engine` is told: `asked` by the user, or the folder that it is here."""

    def check(self, engines: Sequence[Engine]) -> None:
        """Raise ConfigError or ServeError for what cannot run, with what would fit.

        Called before anything is started; starts nothing itself."""

    def address(self, engine: Engine) -> str:
        """Where the gateway finds it, as in the gateway's configuration."""

    def command(self, engine: Engine) -> Command:
        """The root's child; `--status-fd N` is added to it."""
