"""An engine inside this process: the loop on a thread of its own, and a listener without a network.

Callers put submissions in and read their outputs from a queue of their own; the loop sees the same
interface as with `scalellm._core.EngineListener`.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scalellm.engine.loop import Command, EngineLoop
from scalellm.engine.request import Submitted
from scalellm.errors import EngineError
from scalellm.executor.expert_use import ExpertUse

# key and what `EngineListener.emit` calls an output; None when the engine has ended
Outbox = queue.SimpleQueue["tuple[Any, ...] | None"]


@dataclass(slots=True)
class LocalSubmission:
    """What `Submitted` lists, checked by whoever makes it."""

    key: int
    prompt_ids: list[int]
    max_tokens: int
    seed: int
    trace_id: str = ""
    choice: int = 0
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    priority: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = field(default_factory=list)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    resume_ids: list[int] = field(default_factory=list)
    deadline_us: int | None = None
    cache_salt: bytes = b""
    arrival_us: int = field(default_factory=lambda: time.time_ns() // 1000)


class LocalListener:
    """Commands one way, outputs the other; any thread may call."""

    def __init__(self) -> None:
        self._keys = itertools.count(1)
        self._commands: deque[Command] = deque()
        self._arrived = threading.Condition()
        self._outboxes: dict[int, Outbox] = {}
        self._open = True
        self.load: tuple[Any, ...] = ()

    def next_key(self) -> int:
        return next(self._keys)

    def submit(self, submissions: Sequence[Submitted], outbox: Outbox) -> None:
        """Raises EngineError if the engine has ended."""
        with self._arrived:
            if not self._open:
                raise EngineError("the engine has been closed")
            for submission in submissions:
                self._outboxes[submission.key] = outbox
                self._commands.append(("submit", submission))
            self._arrived.notify()

    def cancel(self, keys: Sequence[int]) -> None:
        """Nothing happens for requests that have ended."""
        with self._arrived:
            for key in keys:
                if self._outboxes.pop(key, None) is not None:
                    self._commands.append(("cancel", key))
            self._arrived.notify()

    def wake(self, command: str) -> None:
        with self._arrived:
            self._commands.append((command, None))
            self._arrived.notify()

    def end(self) -> None:
        """The loop has ended: nobody must wait for it any more."""
        with self._arrived:
            self._open = False
            outboxes = {id(outbox): outbox for outbox in self._outboxes.values()}
            self._outboxes.clear()
        for outbox in outboxes.values():
            outbox.put(None)

    def poll(self, timeout_s: float) -> list[Command]:
        with self._arrived:
            if not self._commands and timeout_s > 0.0:
                self._arrived.wait(timeout_s)
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def emit(self, outputs: Sequence[tuple[Any, ...]], load: tuple[Any, ...]) -> None:
        self.load = load
        for output in outputs:
            key = output[0]
            with self._arrived:
                # the third field is the finish reason
                finished = output[2] is not None
                outbox = self._outboxes.pop(key, None) if finished else self._outboxes.get(key)
            if outbox is not None:
                outbox.put(output)

    def emit_kv(
        self, stored: Sequence[tuple[bytes, bytes]], removed: Sequence[bytes], snapshot: bool
    ) -> None:
        """Nobody routes by prefix inside a process."""

    def note_step(
        self,
        number: int,
        started_us: int,
        requests: int,
        tokens: int,
        phases: Sequence[tuple[str, int]],
        expert_use: ExpertUse | None,
    ) -> None:
        """Nobody profiles inside a process."""

    def answer_calibrate(self, ticket: int, step_ms: Sequence[float]) -> None:
        """Nobody calibrates inside a process."""

    def drain(self) -> None:
        """The owner of the engine drains it, and submits nothing afterwards."""


class LocalEngine:
    """A running loop and its thread. `close` cancels what still runs and joins."""

    def __init__(
        self, loop: EngineLoop, listener: LocalListener, release: Callable[[], None]
    ) -> None:
        """`release` is called once, after the loop has ended for good."""
        self.listener = listener
        self._release = release
        self._loop = loop
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scalellm-engine", daemon=True)
        self._thread.start()

    def failure(self) -> EngineError:
        """Why outputs ended, to be raised."""
        return EngineError(f"the engine has ended: {self._failure or 'it was closed'}")

    def close(self) -> None:
        self._loop.stop()
        self.listener.wake("stop")
        self._thread.join()
        self._release()

    def _run(self) -> None:
        try:
            self._loop.run()
        except Exception as error:
            self._failure = error
        finally:
            self.listener.end()
