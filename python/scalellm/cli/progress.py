"""How an engine tells of its start: lines for people, or JSON to the process that started it."""

import json
import os
import sys
import time
from typing import Any


class Progress:
    """Phases of the start with their times.

    With a status descriptor (given by `serve`) they go there, one JSON object a line; without one
    they are printed.
    """

    def __init__(self, status_fd: int | None) -> None:
        self._status_fd = status_fd
        self._phase_s = time.monotonic()
        self._started_s = self._phase_s

    def done(self, phase: str, detail: str = "") -> None:
        """`phase` has taken the time since the last one was done."""
        now = time.monotonic()
        self.phase(phase, now - self._phase_s, detail)
        self._phase_s = now

    def restart(self) -> None:
        """The next phase begins now; what came before has reported itself."""
        self._phase_s = time.monotonic()

    def phase(self, phase: str, seconds: float, detail: str = "") -> None:
        if self._status_fd is not None:
            self._send({"phase": phase, "seconds": seconds, "detail": detail})
        else:
            text = f"  {seconds:8.2f} s  {phase}" + (f": {detail}" if detail else "")
            print(text, file=sys.stderr, flush=True)

    def standing_by(self) -> None:
        """All that needs no memory of its own is done."""
        self._send({"standing_by": True})

    def ready(self, address: str, facts: dict[str, Any]) -> None:
        """Requests can come."""
        if self._status_fd is not None:
            self._send({"ready": True} | facts)
        else:
            pairs = " ".join(f"{name}={value}" for name, value in facts.items())
            after_s = time.monotonic() - self._started_s
            print(f"ready {address} {pairs} after={after_s:.1f}s", flush=True)

    def _send(self, message: dict[str, Any]) -> None:
        if self._status_fd is not None:
            os.write(self._status_fd, json.dumps(message).encode() + b"\n")
