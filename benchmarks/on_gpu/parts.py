"""Running the parts of a measurement, each in a process and within a time of its own.

A kernel that hangs, or spoils the GPU's memory, ends its part and no other. A part is asked to end
when its time is over, so that it can keep what it has and stop its servers; then it is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

_TO_END_S = 20.0  # for a part that was asked to
LEAST_S = 20.0  # a part is not begun with less


class OutOfTimeError(Exception):
    """A part's time is over."""


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do `work`, in which OutOfTimeError is raised when the seconds are over."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTimeError(f"not done within {seconds:.0f} s")

    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_parts(
    limits: Mapping[str, float],
    command: Callable[[str, float], Sequence[str]],
    left_s: Callable[[], float],
    ended: Callable[[str, str | None], None],
) -> None:
    """Run each part of `limits`, in their order, as the process that `command(part, seconds)` is.

    `left_s`: for all that is still to come. `ended(part, why)` is called after each, with the
    reason where the part had no chance to write one."""
    for part, limit_s in limits.items():
        seconds = min(limit_s, left_s())
        if seconds < LEAST_S:
            ended(part, "not begun, the minutes are over")
            continue
        ended(part, _run(command(part, seconds), seconds))


def _run(command: Sequence[str], seconds: float) -> str | None:
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds + _TO_END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"hung, and was killed after {seconds + _TO_END_S:.0f} s"
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return None if code == 0 else f"ended with exit status {code}"


def clock(minutes: float) -> Callable[[], float]:
    """Seconds that are left of so many minutes from now."""
    until = time.monotonic() + 60 * minutes
    return lambda: until - time.monotonic()


def say(text: str) -> None:
    print(text, flush=True, file=sys.stdout)
