"""The other ranks' processes, as rank 0 sees them.

start   spawn; they import torch meanwhile        load    tell them what, once rank 0 has it
watch   a thread; the first that ends ends all    close   ask them to end, then make them

This module imports no torch, so that all ranks can do so at once.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from scalellm.errors import EngineError

_END_S = 2.0  # for a rank to end by itself


class Followers:
    """Ranks 1 and later. `close` and `kill` end them; so does the end of this process.

    `memory` and `logits` are the files that all ranks map, empty until `share`."""

    def __init__(self, ranks: int) -> None:
        """Start them."""
        self.memory = os.memfd_create("scalellm-ranks")
        self.logits = os.memfd_create("scalellm-logits")
        self._controls: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = False
        self._watcher: threading.Thread | None = None
        self._ended, self._end = socket.socketpair()
        for _ in range(1, ranks):
            ours, theirs = socket.socketpair()
            self._controls.append(ours)
            files = {"control": theirs.fileno(), "memory": self.memory, "logits": self.logits}
            options = [f"--{name}={file}" for name, file in files.items()]
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "scalellm.executor.rank", *options],
                    pass_fds=files.values(),
                    stdin=subprocess.DEVNULL,
                )
            self._processes.append(process)

    def share(self, memory_bytes: int, logits_bytes: int) -> None:
        """Make the files so large, of zeros whose memory is taken as it is used."""
        os.ftruncate(self.memory, memory_bytes)
        os.ftruncate(self.logits, logits_bytes)

    def load(self, orders: Sequence[bytes]) -> None:
        """Have each load what its order says; returns at once."""
        for control, line in zip(self._controls, orders, strict=True):
            with contextlib.suppress(OSError):  # `wait_done` finds out why
                control.sendall(line)

    def wait_done(self, limit_s: float | None = None) -> None:
        """Until each says so. Raises EngineError for the first that cannot, TimeoutError when one
        takes longer."""
        for rank, control in enumerate(self._controls, start=1):
            control.settimeout(limit_s)
            try:
                with control.makefile("rb") as stream:
                    line = stream.readline()
            except ConnectionError:
                line = b""
            control.settimeout(None)
            if not line:
                raise EngineError(self._why(rank))
            if error := json.loads(line).get("error"):
                raise EngineError(f"rank {rank} could not load: {error}")

    def watch(self, ended: Callable[[str], None]) -> None:
        """Call `ended` with the reason, on a thread, when one ends before `close`."""
        self._watcher = threading.Thread(
            target=self._watch, args=(ended,), name="scalellm-ranks", daemon=True
        )
        self._watcher.start()

    def _watch(self, ended: Callable[[str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._ended, selectors.EVENT_READ, 0)
            for rank, control in enumerate(self._controls, start=1):
                selector.register(control, selectors.EVENT_READ, rank)
            first = min(key.data for key, _ in selector.select())
        if first and not self._closing:
            ended(self._why(first))

    def _why(self, rank: int) -> str:
        try:
            code = self._processes[rank - 1].wait(_END_S)
        except subprocess.TimeoutExpired:
            return f"rank {rank} has closed its connection"
        if code < 0:
            return f"rank {rank} was killed by {signal.Signals(-code).name}"
        return f"rank {rank} ended with exit status {code}"

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self, stop: Callable[[], None]) -> None:
        """End all, kill those that do not in time. `stop` asks them to. May be called again."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(ConnectionAbortedError):
            stop()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        self._end_all()

    def kill(self) -> None:
        """End all at once, before there was anything to do."""
        if not self._closing:
            self._closing = True
            self._end_all()

    def _end_all(self) -> None:
        self._end.close()
        if self._watcher is not None:
            self._watcher.join()
        for control, process in zip(self._controls, self._processes, strict=True):
            process.kill()
            process.wait()
            control.close()
        self._ended.close()
        os.close(self.memory)
        os.close(self.logits)
