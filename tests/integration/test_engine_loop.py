"""The loop on its threads, with an executor that reads what the KV blocks hold."""

import itertools
import math
import os
import queue
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalellm.config import EngineConfig
from scalellm.engine.local import LocalListener, LocalSubmission
from scalellm.engine.loop import SIGN_OF_LIFE_S, EngineLoop
from scalellm.engine.worker import Worker
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


def test_many_requests_at_once_each_get_their_own_continuation() -> None:
    rng = random.Random(1)
    executor = TableExecutor(num_blocks=60)
    with running(executor) as engine:
        wanted = {}
        for _ in range(80):
            prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 60))]
            wanted[engine.submit(prompt, 30)] = continuation(prompt, 30)
        engine.finish(*wanted)
        for key, expected in wanted.items():
            assert engine.ids(key) == expected
            assert engine.reason(key) == ("eos" if expected[-1] == EOS else "length")
        assert engine.loop.scheduler.kv.num_used == 0
        running_now, waiting, backlog, used, total, step_ms, *_ = engine.listener.load
        assert (running_now, waiting, backlog, used, total) == (0, 0, 0, 0, 60) and step_ms > 0


def test_prompts_longer_than_a_step_and_preempted_requests_continue_exactly() -> None:
    executor = TableExecutor(num_blocks=50)
    with running(executor) as engine:
        prompts = [[n + 1] * 90 for n in range(8)]
        keys = [engine.submit(prompt, 60, ignore_eos=True) for prompt in prompts]
        engine.finish(*keys)
        assert engine.loop.scheduler.num_preemptions > 0
        for key, prompt in zip(keys, prompts, strict=True):
            context = list(prompt)
            for _ in range(60):
                context.append(next_token(context))
            assert engine.ids(key) == context[90:]


def test_cancelling_gives_the_blocks_back_and_answers() -> None:
    with running(TableExecutor()) as engine:
        keys = [engine.submit([n + 1, 2, 3], 150, ignore_eos=True) for n in range(10)]
        while len(engine.ids(keys[0])) < 5:
            engine.take()
        for key in keys[::2]:
            engine.listener.command("cancel", key)
        engine.finish(*keys)
        assert [engine.reason(key) for key in keys] == ["cancelled", "length"] * 5
        assert engine.loop.scheduler.kv.num_used == 0


def test_an_idle_loop_gives_signs_of_life() -> None:
    with running(TableExecutor()) as engine:
        time.sleep(1.0)
        signs = engine.listener.signs
        gaps = [after - before for before, after in itertools.pairwise(signs)]
        assert len(gaps) >= 4 and max(gaps) < SIGN_OF_LIFE_S + 0.3


def test_a_long_step_gives_signs_of_life_and_takes_in_meanwhile() -> None:
    release = threading.Event()
    executor = TableExecutor()
    executor.before = lambda _batch: assert_(release.wait(30))
    with running(executor) as engine:
        first = engine.submit([5], 1)
        wait_until(lambda: executor.steps == 1)
        second = engine.submit([6], 1)
        wait_until(lambda: engine.listener.load[1] == 1)
        signs = len(engine.listener.signs)
        wait_until(lambda: len(engine.listener.signs) > signs + 2)
        release.set()
        engine.finish(first, second)


def test_a_hung_step_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalellm.engine.loop._HUNG_UNPREDICTED_S", 0.3)
    release = threading.Event()
    executor = TableExecutor()
    executor.before = lambda _batch: assert_(release.wait(30))
    with running(executor) as engine:
        key = engine.submit([5], 1)
        wait_until(lambda: executor.steps == 1)
        wait_until(lambda: time.monotonic() - engine.listener.signs[-1] > 3 * SIGN_OF_LIFE_S)
        release.set()
        engine.finish(key)


def test_a_failing_step_ends_its_requests_and_the_loop_lives_on() -> None:
    executor = TableExecutor()

    def fail(batch: Batch) -> None:
        if any(13 in span.token_ids for span in batch.spans):
            raise RuntimeError("bad batch")

    executor.before = fail
    with running(executor) as engine:
        bad = engine.submit([13, 1], 5)
        engine.finish(bad)
        assert "could not compute a step: RuntimeError: bad batch" in engine.outputs[bad][-1][8]
        good = engine.submit([3, 1], 1)
        engine.finish(good)
        assert engine.ids(good) == continuation([3, 1], 1)


def test_steps_that_fail_again_and_again_end_the_engine() -> None:
    executor = TableExecutor()

    def fail(_batch: Batch) -> None:
        raise RuntimeError("the device is gone")

    executor.before = fail
    with running(executor) as engine:
        for _ in range(5):
            engine.finish(engine.submit([1], 1))
        engine.thread.join(30)
        assert "5 steps in a row failed; the last: the device is gone" in str(engine.failure)


def test_an_executor_that_can_compute_no_more_ends_the_engine() -> None:
    executor = TableExecutor()
    with running(executor) as engine:
        key = engine.submit([1, 2, 3], 1000, ignore_eos=True)
        engine.take()
        executor.failure = EngineError("a rank was lost")
        engine.finish(key)
        assert engine.reason(key) == "cancelled"
        engine.thread.join(timeout=30)
        assert engine.failure is executor.failure


def test_a_fault_of_the_loop_while_a_step_runs_gives_up_every_request() -> None:
    """The step that was in flight is never taken in; its requests must not be left waiting."""
    executor = TableExecutor()
    computing, looked = threading.Event(), threading.Event()

    class FaultyOnce(RecordingListener):
        def poll(self, timeout_s: float) -> list[Any]:
            if computing.is_set() and not looked.is_set():
                looked.set()
                raise RuntimeError("a fault of the loop")
            return super().poll(timeout_s)

    listener = FaultyOnce()

    def before(_batch: Batch) -> None:
        computing.set()
        assert looked.wait(10)

    executor.before = before
    loop = EngineLoop(executor, listener, CONFIG)
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    keys = [listener.next_key() for _ in range(3)]
    submissions = [LocalSubmission(key, [5, 6, key], 4, seed=1) for key in keys]
    listener.submit(submissions, outbox)
    with pytest.raises(RuntimeError, match="a fault of the loop"):
        loop.run()
    ended = [outbox.get(timeout=1) for _ in keys]
    assert sorted(output[0] for output in ended) == keys
    assert all(output[2] == "cancelled" and "the engine ended" in output[8] for output in ended)
    loop.scheduler.check_integrity()


def test_a_panic_of_the_kernels_is_a_failed_step() -> None:
    class Panic(BaseException):
        """As PyO3's."""

    def panic(_batch: Batch) -> None:
        executor.before = lambda _batch: None
        raise Panic("index out of bounds")

    executor = TableExecutor()
    executor.before = panic
    with running(executor) as engine:
        key = engine.submit([5, 6], 3)
        engine.finish(key)
        assert engine.reason(key) == "error" and "Panic" in engine.outputs[key][-1][8]
        after = engine.submit([5, 6], 3)
        engine.finish(after)
        assert engine.ids(after) == continuation([5, 6], 3)


def test_logits_that_are_not_numbers_end_that_request_alone() -> None:
    class Poisoned(TableExecutor):
        def forward(self, batch: Batch) -> torch.Tensor:
            logits = super().forward(batch)
            for row, span in enumerate(batch.spans):
                if 13 in span.token_ids:
                    logits[row] = math.nan
            return logits

    with running(Poisoned()) as engine:
        bad = engine.submit([13], 5)
        good = engine.submit([3], 5)
        engine.finish(bad, good)
        assert engine.reason(bad) == "error" and "not finite" in engine.outputs[bad][-1][8]
        assert engine.ids(good) == continuation([3], 5)


def test_stop_ids_and_the_stage_times_are_reported() -> None:
    prompt = [7, 8]
    stop = continuation(prompt, 4)[3]
    with running(TableExecutor()) as engine:
        key = engine.submit(prompt, 50, ignore_eos=True, stop_token_ids=[stop])
        engine.finish(key)
        *_, last = engine.outputs[key]
        assert engine.reason(key) == "stop_token" and last[7] == stop
        queued, scheduled, first_token, finished, preemptions, steps, _, _ = last[6]
        assert 0 < queued <= scheduled <= first_token <= finished
        assert (preemptions, steps) == (0, len(engine.ids(key)))
        assert engine.outputs[key][0][6] is not None


def test_phases_add_up_to_the_times_of_the_request() -> None:
    class Slow(TableExecutor):
        def forward(self, batch: Batch) -> torch.Tensor:
            logits = super().forward(batch)
            time.sleep(0.004)
            self.last_forward_ms = {"prepare": 1.0, "attention": 2.0}
            return logits

    with running(Slow()) as engine:
        key = engine.submit([7, 8], 20, ignore_eos=True)
        engine.finish(key)
        first, last = engine.outputs[key][0][6], engine.outputs[key][-1][6]
        _, scheduled, first_token, finished, _, steps, prefill, decode = last
        assert first[6] == prefill and first[7] == []
        for phases, took_us in (
            (prefill, first_token - scheduled),
            (decode, finished - first_token),
        ):
            # Two clocks, each cut to microseconds.
            assert abs(sum(us for _, us in phases) - took_us) <= 50 + took_us // 50
        decoded = dict(decode)
        assert decoded["forward/attention"] == 2000 * (steps - 1)
        assert decoded["prepare"] == 1000 * (steps - 1)
        assert {"schedule", "forward", "sample", "hand over", "update"} <= decoded.keys()
        number, started, requests, tokens, phases, used = engine.listener.steps[-1]
        assert used == (1, 2, 5, [5, 0, 1], 1), "of this step alone"
        assert (number, requests, tokens) == (steps, 1, 1) and started >= first_token
        assert dict(phases)["forward/attention"] == 2000


def test_logprobs_of_output_and_prompt_have_one_entry_a_token() -> None:
    prompt = [4, 9] * 50
    with running(TableExecutor()) as engine:
        key = engine.submit(prompt, 3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
        engine.finish(key)
        outputs = engine.outputs[key]
        assert [[entry[0] for entry in output[4]] for output in outputs] == [
            output[1] for output in outputs
        ]
        assert all(
            entry[2] == 1 and len(entry[3]) == 2 for output in outputs for entry in output[4]
        )
        entries = outputs[0][5]
        assert entries[0] is None and [entry[0] for entry in entries[1:]] == prompt[1:]
        for position, entry in enumerate(entries[1:], 1):
            assert entry[3] == [next_token(prompt[:position])]
        assert all(output[5] is None for output in outputs[1:])


def test_sampling_with_a_seed_repeats_and_resumes() -> None:
    class Flat(TableExecutor):
        def forward(self, batch: Batch) -> torch.Tensor:
            return super().forward(batch) * 0.1

    with running(Flat()) as engine:
        sampled = {"temperature": 1.0, "seed": 77, "ignore_eos": True}
        first = engine.submit([3], 20, **sampled)
        neighbour = engine.submit([3], 20, **{**sampled, "choice": 1})
        engine.finish(first, neighbour)
        again = engine.submit([3], 20, **sampled)
        resumed = engine.submit([3], 20, **sampled, resume_ids=engine.ids(first)[:9])
        engine.finish(again, resumed)
        assert engine.ids(first) == engine.ids(again) != engine.ids(neighbour)
        assert engine.ids(resumed) == engine.ids(first)[9:]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "top_k": 30},
        {"temperature": 1.0, "logprobs": 2},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"temperature": 1.0, "min_tokens": 12, "ignore_eos": False, "logit_bias": [(EOS, 5.0)]},
        {"temperature": 1.0, "stop_token_ids": list(range(1, VOCAB, 8)), "min_tokens": 6},
        {"temperature": 1.0, "prompt_logprobs": 1},
    ],
    ids=lambda fields: "-".join(fields) or "greedy",
)
def test_every_way_of_sampling_resumes_where_it_was(fields: dict[str, Any]) -> None:
    class Flat(TableExecutor):
        def forward(self, batch: Batch) -> torch.Tensor:
            return super().forward(batch) * 0.1

    asked = {"seed": 5, "choice": 2, "ignore_eos": True, **fields}
    with running(Flat()) as engine:
        whole = engine.submit([3, 4, 5, 6, 7], 24, **asked)
        engine.finish(whole)
        ids = engine.ids(whole)
        assert len(ids) > 5
        logprobs = [entry for output in engine.outputs[whole] for entry in output[4] or ()]
        for cut in {1, 5, len(ids) // 2, len(ids) - 1}:
            rest = engine.submit([3, 4, 5, 6, 7], 24, **asked, resume_ids=ids[:cut])
            engine.finish(rest)
            assert engine.ids(rest) == ids[cut:]
            assert engine.reason(rest) == engine.reason(whole)
            told = [entry for output in engine.outputs[rest] for entry in output[4] or ()]
            assert told == logprobs[cut:]
            assert all(output[5] is None for output in engine.outputs[rest])


def test_a_deadline_ends_a_request_that_waits() -> None:
    with running(TableExecutor()) as engine:
        key = engine.submit([1], 190, ignore_eos=True, deadline_us=time.time_ns() // 1000 - 1)
        engine.finish(key)
        assert engine.reason(key) == "deadline"


def test_draining_finishes_what_runs_then_ends() -> None:
    with running(TableExecutor()) as engine:
        keys = [engine.submit([n + 1], 100, ignore_eos=True) for n in range(4)]
        engine.take()
        engine.loop.drain()
        engine.finish(*keys)
        engine.thread.join(30)
        assert not engine.thread.is_alive() and engine.listener.drained.is_set()
        assert all(len(engine.ids(key)) == 100 for key in keys)


def test_draining_has_a_bound() -> None:
    executor = TableExecutor()
    executor.before = lambda _batch: time.sleep(0.05)
    with running(executor, drain_timeout_s=0.2) as engine:
        key = engine.submit([1], 190, ignore_eos=True)
        engine.take()
        engine.listener.command("drain")
        engine.finish(key)
        assert engine.reason(key) == "cancelled"  # and so may go on at another engine


def test_handing_over_gives_every_request_back_and_ends() -> None:
    executor = TableExecutor()
    executor.before = lambda _batch: time.sleep(0.01)  # what a step is predicted to take
    with running(executor) as engine:
        keys = [engine.submit([n + 1], 190, ignore_eos=True) for n in range(4)]
        while any(not engine.outputs[key] for key in keys):
            engine.take()
        engine.loop.hand_over()
        engine.finish(*keys)
        engine.thread.join(30)
        assert not engine.thread.is_alive() and engine.listener.drained.is_set()
        assert {engine.reason(key) for key in keys} == {"cancelled"}
        # One after the other: the first had the fewest tokens when it was given back.
        assert len({len(engine.ids(key)) for key in keys}) > 1


def test_stop_cancels_everything_and_ends() -> None:
    with running(TableExecutor()) as engine:
        key = engine.submit([1], 190, ignore_eos=True)
        engine.take()
        engine.listener.command("stop")
        engine.finish(key)
        engine.thread.join(30)
        assert engine.reason(key) in ("cancelled", "length") and not engine.thread.is_alive()


def test_kv_events_and_snapshot_name_the_same_blocks() -> None:
    with running(TableExecutor()) as engine:
        key = engine.submit(range(1, 14), 1)
        engine.finish(key)
        engine.listener.command("kv_snapshot")
        wait_until(lambda: bool(engine.listener.snapshots))
        assert sorted(engine.listener.snapshots[0]) == sorted(engine.listener.stored)
        assert len(engine.listener.stored) == 3 and engine.listener.stored[0][0] == b""
        assert engine.listener.removed == []


def test_calibration_times_the_shapes_that_fit() -> None:
    executor = TableExecutor()
    with running(executor) as engine:
        engine.listener.command("calibrate", (9, [(4, 8, 0), (0, 0, 32), (2, 5, 10), (500, 1, 1)]))
        ticket, times_ms = engine.listener.calibrated.get(timeout=30)
        assert ticket == 9 and all(ms > 0 for ms in times_ms[:3]) and math.isnan(times_ms[3])
        assert engine.loop.scheduler.kv.num_used == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_(held: bool) -> None:
    assert held


def test_the_loop_warms_up_before_it_is_ready_and_leaves_no_block_taken() -> None:
    executor = TableExecutor()
    loop = EngineLoop(executor, RecordingListener(), CONFIG)
    used: list[int] = []

    def ready() -> None:
        used.append(loop.scheduler.kv.num_used)
        loop.stop()

    loop.run(ready)
    assert used == [0]


def test_a_model_that_cannot_run_is_never_ready() -> None:
    class Broken(TableExecutor):
        def forward(self, batch: Any) -> torch.Tensor:
            raise RuntimeError(f"no kernel for {batch.num_tokens} tokens")

    loop = EngineLoop(Broken(), RecordingListener(), CONFIG)
    with pytest.raises(EngineError, match="the model cannot run: no kernel for"):
        loop.run(lambda: pytest.fail("ready"))


def test_compute_threads_give_way_to_the_others() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with Worker[int](nice=3) as worker:
        worker.start(niceness)
        done = None
        while done is None:
            done = worker.wait(1.0)
    assert done.result == niceness() + 3
