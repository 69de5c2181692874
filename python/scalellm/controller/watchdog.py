"""Ends what is left of the process tree after its root has died, even by SIGKILL.

The kernel kills the root's children (PR_SET_PDEATHSIG) but not theirs. The watchdog is forked from
the root before anything else and waits on a pipe that only the root holds open; at its end it kills
every process that carries the tree's mark in its environment, and removes the runtime folder.
Processes pass their environment on, so that grandchildren carry the mark wherever they moved
(own group, own session, other parent).
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK_VARIABLE = "SCALELLM_TREE"
_SWEEP_PAUSE_S = 0.02
_SWEEPS = 250


class Watchdog:
    """Owner of the watchdog process; must be made before any other process and any thread."""

    def __init__(self, mark: str, folder: Path) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writing)
            _watch(reading, mark, folder)
        os.close(reading)
        self._writing = writing

        self._reaped = False

    def ended(self) -> bool:
        """Whether somebody killed it, or stopped it, which ends it: then make another."""
        if self._reaped:
            return True
        found, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if found and os.WIFSTOPPED(status):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if found:
            self._reaped = True
            os.close(self._writing)
        return self._reaped

    def close(self) -> None:
        """Let it sweep now, and wait until it has."""
        if not self.ended():
            os.close(self._writing)
            os.waitpid(self.pid, 0)


def _watch(reading: int, mark: str, folder: Path) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    try:
        while os.read(reading, 1):
            pass
        for _ in range(_SWEEPS):
            if not kill_marked(mark):
                break
            time.sleep(_SWEEP_PAUSE_S)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def kill_marked(mark: str, variable: str = MARK_VARIABLE) -> list[int]:
    """SIGKILL every process marked `variable=mark` but this one; returns those found."""
    wanted = f"{variable}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            if wanted in environment.split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
                found.append(int(entry.name))
        except OSError:  # gone, or another user's
            continue
    return found
