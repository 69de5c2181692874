"""A child that the root restarts by itself: the gateway and the controller."""

import time

from scalellm.controller.child import Child
from scalellm.controller.policy import Exit, Limits, backoff_s

_CRASH_WINDOW_S = 60.0


class Restarted:
    """Facts about it: its process if there is one, and when the next one starts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.child: Child | None = None
        self.due_s: float | None = 0.0  # monotonic time of the next start; None: do not start
        self._exits: list[float] = []

    def ended(self, limits: Limits) -> int:
        """Schedule the next start; returns how many times it ended lately."""
        now = time.monotonic()
        self.child = None
        self._exits = [at for at in self._exits if now - at < _CRASH_WINDOW_S] + [now]
        recent = [Exit(now - at, False, "") for at in self._exits]
        self.due_s = now + backoff_s(recent, limits)
        return len(recent)
