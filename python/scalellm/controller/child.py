"""One child process: started so that it cannot outlive its parent, and described when it ends."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scalellm.controller.watchdog import kill_marked

# -P: the working folder must not shadow modules of ours.
PYTHON = (sys.executable, "-P", "-m")
HAND_OVER = signal.SIGUSR1  # asks an engine to give its requests back and end
GO = signal.SIGUSR2  # tells an engine that stands by to take its memory
_PR_SET_PDEATHSIG = 1
_MARK_VARIABLE = "SCALELLM_CHILD"  # what it starts carries it on, into whatever group or session


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a process."""

    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended."""

    exit_code: int | None
    signal_number: int | None

    @classmethod
    def of(cls, returncode: int) -> "Ending":
        return cls(None, -returncode) if returncode < 0 else cls(returncode, None)

    def __str__(self) -> str:
        if self.signal_number is not None:
            try:
                return f"killed by {signal.Signals(self.signal_number).name}"
            except ValueError:
                return f"killed by signal {self.signal_number}"
        return f"exit code {self.exit_code}"


class Child:
    """A running process in a session of its own.

    A session of its own means that a terminal's Ctrl-C does not reach it. On Linux the kernel kills
    it when the parent dies (PR_SET_PDEATHSIG); the signal is tied to the thread that starts it, so
    start children from the main thread only.
    """

    def __init__(
        self,
        name: str,
        command: Command,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        stderr: int | None = None,
    ) -> None:
        self.name = name
        self.started_s = time.monotonic()
        self._mark = f"{name}-{os.urandom(8).hex()}"
        self._process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env={**environment, _MARK_VARIABLE: self._mark},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> Ending | None:
        """How it ended, or None while it runs.

        What it has started and left is killed before it is reaped: until then its pid, which names
        its group, cannot belong to anyone else.
        """
        if self._process.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            self.kill_group()
            kill_marked(self._mark, _MARK_VARIABLE)
        return Ending.of(self._process.wait())

    def wait(self, timeout_s: float) -> None:
        """Wait for a killed process to be gone; gives up silently."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def signal(self, number: int) -> None:
        """Signal the process alone; nothing happens when it has been reaped."""
        if self._process.returncode is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to the process and to whatever it started in its group."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def die_with_parent() -> Callable[[], None]:
    """What a child runs between fork and exec; made before the fork, so that it imports nothing."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return prepare
