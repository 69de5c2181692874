"""Engines as processes of this machine."""

from collections.abc import Sequence
from pathlib import Path

from scalellm.controller.child import PYTHON, Command
from scalellm.controller.cores import usable_cores
from scalellm.controller.launchers.launcher import Engine

_MAX_THREADS = 1024  # what the setting allows; more than there are cores is the user's choice
_ENGINE_TOML = "# Empty: `serve` has resolved every setting; no scalellm.toml may add its own.\n"


class LocalLauncher:
    """Their sockets lie in the deployment's folder."""

    def __init__(self, folder: Path, gpus: int = 0) -> None:
        """`gpus`: of this machine, as far as is known."""
        self._folder = folder
        self._gpus = gpus
        self._config = folder / "engine.toml"
        self._config.write_text(_ENGINE_TOML, encoding="utf-8")

    @property
    def cores(self) -> int:
        return usable_cores()

    @property
    def gpus(self) -> int | None:
        return self._gpus

    @property
    def most_threads(self) -> int:
        return _MAX_THREADS

    def model(self, _asked: str, path: Path, /) -> str:
        return str(path)

    def check(self, engines: Sequence[Engine]) -> None:
        """Everything that a plan allows fits; cores are shared where there are too few."""

    def address(self, engine: Engine) -> str:
        return f"unix:{self._folder / engine.name}.sock"

    def command(self, engine: Engine) -> Command:
        own = ("--config", str(self._config), "--listen", self.address(engine))
        return Command((*PYTHON, "scalellm", "engine", engine.model, *engine.flags, *own))
