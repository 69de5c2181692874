"""An engine's loop on a thread, with an executor that reads what the KV blocks hold."""

import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from scalellm.config import EngineConfig
from scalellm.engine.local import LocalListener, LocalSubmission
from scalellm.engine.loop import EngineLoop
from scalellm.errors import EngineError
from scalellm.executor.batch import Batch
from scalellm.executor.expert_use import ExpertUse

VOCAB = 61
EOS = 0
CONFIG = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64, cpu_threads=1)


def next_token(context: Sequence[int]) -> int:
    return zlib.crc32(repr(list(context)).encode()) % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    context = list(prompt)
    while len(context) < len(prompt) + count:
        context.append(next_token(context))
        if context[-1] == EOS:
            break
    return context[len(prompt) :]


class TableExecutor:
    """Its logits are one-hot: a function of the ids that it finds in the blocks."""

    max_model_len = 200
    device = torch.device("cpu")
    vocab_size = VOCAB
    model_config = SimpleNamespace(eos_token_ids=(EOS,))

    def __init__(self, num_blocks: int = 64, block_size: int = 4) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.memory = [[-1] * block_size for _ in range(num_blocks)]
        self.before: Callable[[Batch], None] = lambda _batch: None
        self.last_forward_ms: dict[str, float] = {}
        self.torch_threads: int | None = None
        self.steps = 0
        self.failure: EngineError | None = None

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def expert_use(self) -> ExpertUse:
        """Of three experts of one layer."""
        return (self.steps, 2 * self.steps, 5 * self.steps, [5 * self.steps, 0, self.steps], 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        self.steps += 1
        self.before(batch)
        rows = []
        for span in batch.spans:
            for position, token in enumerate(span.token_ids, span.start):
                self._block(span, position)[position % self.block_size] = token
            end = span.start + len(span.token_ids)
            held = [self._block(span, i)[i % self.block_size] for i in range(end)]
            rows += [next_token(held[: end - i]) for i in reversed(range(span.num_logits))]
        logits = torch.full((len(rows), VOCAB), -5.0)
        logits[range(len(rows)), rows] = 5.0
        return logits

    def greedy(self, _batch: Batch) -> list[int | None] | None:
        return None

    def draw(self, _batch: Batch, _draws: Any) -> list[int | None] | None:
        return None

    def _block(self, span: Any, position: int) -> list[int]:
        return self.memory[span.block_table[position // self.block_size]]


class RecordingListener(LocalListener):
    """Keeps what the loop gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.signs: list[float] = []
        self.stored: list[tuple[bytes, bytes]] = []
        self.removed: list[bytes] = []
        self.snapshots: list[list[tuple[bytes, bytes]]] = []
        self.steps: list[tuple[Any, ...]] = []
        self.calibrated: queue.SimpleQueue[tuple[int, list[float]]] = queue.SimpleQueue()
        self.drained = threading.Event()

    def emit(self, outputs: Sequence[tuple[Any, ...]], load: tuple[Any, ...]) -> None:
        self.signs.append(time.monotonic())
        super().emit(outputs, load)

    def emit_kv(
        self, stored: Sequence[tuple[bytes, bytes]], removed: Sequence[bytes], snapshot: bool
    ) -> None:
        if snapshot:
            self.snapshots.append(list(stored))
        else:
            self.stored += stored
            self.removed += removed

    def note_step(self, *step: Any) -> None:
        self.steps.append(step)

    def answer_calibrate(self, ticket: int, step_ms: Sequence[float]) -> None:
        self.calibrated.put((ticket, list(step_ms)))

    def drain(self) -> None:
        self.drained.set()

    def command(self, name: str, value: Any = None) -> None:
        with self._arrived:
            self._commands.append((name, value))
            self._arrived.notify()


class Engine:
    """A loop on a thread, and a way to wait for results."""

    def __init__(self, loop: EngineLoop, listener: RecordingListener) -> None:
        self.loop = loop
        self.listener = listener
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.outputs: dict[int, list[tuple[Any, ...]]] = {}
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except EngineError as error:
            self.failure = error
        finally:
            self.listener.end()

    def submit(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> int:
        key = self.listener.next_key()
        fields = {"temperature": 0.0, "seed": 1, **more}
        submission = LocalSubmission(key, list(prompt), max_tokens, **fields)
        self.listener.submit([submission], self.outbox)
        self.outputs[key] = []
        return key

    def take(self) -> tuple[Any, ...]:
        output: tuple[Any, ...] = self.outbox.get(timeout=30)
        self.outputs[output[0]].append(output)
        return output

    def finish(self, *keys: int) -> None:
        while any(not self.outputs[k] or self.outputs[k][-1][2] is None for k in keys):
            self.take()

    def ids(self, key: int) -> list[int]:
        return [token for output in self.outputs[key] for token in output[1]]

    def reason(self, key: int) -> str | None:
        return self.outputs[key][-1][2]


@contextmanager
def running(
    executor: TableExecutor, config: EngineConfig = CONFIG, **more: Any
) -> Iterator[Engine]:
    listener = RecordingListener()

    def check(scheduler: Any) -> None:
        scheduler.check_integrity()

    engine = Engine(EngineLoop(executor, listener, config, after_step=check, **more), listener)
    try:
        yield engine
    finally:
        engine.loop.stop()
        engine.thread.join(timeout=30)
        assert not engine.thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
