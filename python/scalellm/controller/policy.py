"""Which replicas should run: a pure function of facts; a restarted controller decides alike.

               exit before it was ever ready, by itself
(absent) --> starting ----------------------------------------------> given up
               | ready                                                   ^
               v               exit                   too many exits     |
             running ----------------------> waiting --------------------'
               | hung: killed                   | backoff over
               '------------> (exit)            '--> starting
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """When to restart, and when to stop trying."""

    backoff_min_s: float = 0.25
    backoff_max_s: float = 30.0
    crash_window_s: float = 120.0
    crash_limit: int = 5  # exits within the window
    hung_after_s: float = 30.0
    start_timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Exit:
    """One end of a replica's process."""

    ago_s: float
    by_itself: bool  # an exit code, not a signal
    how: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the root knows about one replica."""

    running: bool
    ready: bool = False
    age_s: float = 0.0  # of the running process
    ever_ready: bool = False  # in any of its processes
    exits: tuple[Exit, ...] = ()  # oldest first
    unresponsive_s: float = 0.0  # how long the gateway has had no sign of life
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing to do, or nothing yet."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start it now."""


@dataclass(frozen=True, slots=True)
class Kill:
    """End its process; a new one follows."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start it again."""

    reason: str


Decision = Leave | Start | Kill | GiveUp


def decide(facts: Facts, limits: Limits) -> Decision:
    """What to do about one wanted replica."""
    if facts.given_up:
        return Leave()
    if facts.running:
        return _running(facts, limits)
    if not facts.exits:
        return Start()
    last = facts.exits[-1]
    if not facts.ever_ready and last.by_itself:
        return GiveUp(f"could not start ({last.how})")
    recent = [found for found in facts.exits if found.ago_s <= limits.crash_window_s]
    if len(recent) >= limits.crash_limit:
        return GiveUp(
            f"ended {len(recent)} times in {limits.crash_window_s:g} s, the last time {last.how}"
        )
    return Start() if last.ago_s >= backoff_s(recent, limits) else Leave()


def _running(facts: Facts, limits: Limits) -> Decision:
    if not facts.ready:
        if facts.age_s > limits.start_timeout_s:
            return Kill(f"not ready after {limits.start_timeout_s:g} s")
        return Leave()
    if facts.unresponsive_s > limits.hung_after_s:
        return Kill(f"no sign of life for {facts.unresponsive_s:.0f} s")
    return Leave()


def backoff_s(recent: Sequence[Exit], limits: Limits) -> float:
    """Pause before the next start: none after the first exit of a window, then doubling."""
    if len(recent) <= 1:
        return 0.0
    return float(min(limits.backoff_min_s * 2.0 ** (len(recent) - 2), limits.backoff_max_s))
