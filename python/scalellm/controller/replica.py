"""The root's record of one replica: its process if there is one, and how its earlier ones ended."""

import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from scalellm.controller.channel import Lines
from scalellm.controller.child import Child, Command, Ending

_EXITS_KEPT = 16


@dataclass(slots=True)
class Replica:
    """Facts only; what follows from them is the controller's to decide."""

    name: str
    address: str
    command: Command
    child: Child | None = None
    status: Lines | None = None
    held: bool = False  # to stand by, without the memory that another still has
    standing_by: bool = False  # until it is ready
    ready: bool = False
    ever_ready: bool = False
    given_up: str = ""
    wanted: bool = True  # to be kept running
    target: bool = True  # of the blueprint that is in force or coming
    info: dict[str, Any] = field(default_factory=dict)
    exits: deque[tuple[float, Ending]] = field(default_factory=lambda: deque(maxlen=_EXITS_KEPT))

    def start(self, environment: dict[str, str]) -> Lines:
        """Spawn the process with a status pipe; returns the pipe's reading end."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        more = ("--stand-by",) if self.held else ()
        command = Command((*self.command.arguments, "--status-fd", str(writing), *more))
        try:
            self.child = Child(self.name, command, environment, (writing,))
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.ready = self.standing_by = False
        self.status = Lines(reading)
        return self.status

    def close_status(self) -> None:
        if self.status is not None:
            os.close(self.status.descriptor)
            self.status = None

    def ended(self, ending: Ending) -> None:
        """The process has been reaped."""
        if self.wanted:
            self.exits.append((time.monotonic(), ending))
        else:
            self.exits.clear()
        self.child, self.ready, self.standing_by = None, False, False

    def facts(self) -> dict[str, Any]:
        """The facts as the controller reads them: `policy.Facts` but for the gateway's part."""
        now = time.monotonic()
        return {
            "running": self.child is not None,
            "held": self.held,
            "standing_by": self.standing_by,
            "ready": self.ready,
            "age_s": now - self.child.started_s if self.child else 0.0,
            "ever_ready": self.ever_ready,
            "given_up": self.given_up,
            "wanted": self.wanted,
            "target": self.target,
            "exits": [
                {
                    "ago_s": now - at,
                    "by_itself": ending.exit_code is not None,
                    "how": str(ending),
                }
                for at, ending in self.exits
            ],
        }
