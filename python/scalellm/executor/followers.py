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
from typing import Self

from scalellm.config import EngineConfig
from scalellm.errors import EngineError
from scalellm.executor.hosts import Meeting, Place, connect

_END_S = 2.0  # for a rank to end by itself


def start_rank(rank: int, address: Place, alive: int, *more: str) -> "subprocess.Popen[bytes]":
    """A rank's process, which comes to rank 0 at `address`.

    `alive`: a pipe that ends with this process, and the rank with it; `more`: its own options."""
    host, port = address
    options = (f"--rank={rank}", f"--master={host}", f"--port={port}", *more)
    return subprocess.Popen([sys.executable, "-m", "scalellm.executor.rank", *options], stdin=alive)


class Followers:
    """Ranks 1 and later. `close` and `kill` end them; so does the end of this process.

    `memory` and `logits` are the files that all ranks map, empty until `share`."""

    @classmethod
    def of(cls, config: EngineConfig) -> Self:
        """Those that `config` asks for. Raises EngineError."""
        meeting: Meeting | None = None
        if config.nnodes > 1:
            meeting = Meeting(config.first_host, config.master_port)
        return cls(config.tensor_parallel_size, config.nnodes, meeting)

    def __init__(self, ranks: int, hosts: int = 1, meeting: Meeting | None = None) -> None:
        """Start those of this host; with `meeting` all ranks come there, from `hosts`."""
        self._ranks, self._meeting = ranks, meeting
        self.memory = os.memfd_create("scalellm-ranks")
        self.logits = os.memfd_create("scalellm-logits")
        self._controls: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = False
        self._watcher: threading.Thread | None = None
        self._ended, self._end = socket.socketpair()
        self._alive = os.pipe()
        if meeting is not None:
            here = range(1, ranks // hosts)
            self._processes = [start_rank(rank, meeting.address, self._alive[0]) for rank in here]
            return
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

    def linked(self) -> list[socket.socket | None] | None:
        """Connections to all ranks, by rank, once those of other hosts have come; None where all
        are on this one. Raises EngineError."""
        if self._meeting is None:
            return None
        self._controls, places = self._meeting.wait(self._ranks, self._check_started)
        line = json.dumps({"places": places, "key": self._meeting.key}).encode() + b"\n"
        self.load([line] * len(self._controls))
        return connect(0, places, self._meeting.key, self._meeting.listener)

    def _check_started(self) -> None:
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise EngineError(self._why(rank))

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
            except TimeoutError:
                if limit_s is not None:
                    raise
                line = b""  # from the kernel: its host does not answer
            except OSError:
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

    def wait_told(self, limit_s: float) -> None:
        """Until `watch` has told that one has ended, or nothing has come of it."""
        if self._watcher is not None:
            self._watcher.join(limit_s)

    def _watch(self, ended: Callable[[str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._ended, selectors.EVENT_READ, 0)
            for rank, control in enumerate(self._controls, start=1):
                selector.register(control, selectors.EVENT_READ, rank)
            first = min(key.data for key, _ in selector.select())
        if first and not self._closing:
            ended(self._why(first))

    def _why(self, rank: int) -> str:
        if rank > len(self._processes):
            return f"rank {rank}, on another host, has ended"
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
        for process in self._processes:
            process.kill()
            process.wait()
        for control in self._controls:
            control.close()
        if self._meeting is not None:
            self._meeting.close()
        self._ended.close()
        for file in self._alive:
            os.close(file)
        os.close(self.memory)
        os.close(self.logits)
