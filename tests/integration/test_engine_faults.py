"""Steps that fail, hang or take long, and what the loop says of them."""

import itertools
import math
import queue
import threading
import time
from typing import Any

import pytest
import torch

from scalellm.engine.local import LocalSubmission
from scalellm.engine.loop import SIGN_OF_LIFE_S, EngineLoop
from scalellm.errors import EngineError
from scalellm.executor.batch import Batch

from .table_engine import (
    CONFIG,
    RecordingListener,
    TableExecutor,
    continuation,
    running,
    wait_until,
)


def assert_(held: bool) -> None:
    assert held


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


def test_a_failing_step_ends_its_requests_and_the_loop_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = TableExecutor()

    def fail(batch: Batch) -> None:
        if any(13 in span.token_ids for span in batch.spans):
            raise RuntimeError("bad batch")

    executor.before = fail
    with running(executor) as engine:
        bad = engine.submit([13, 1], 5, trace_id="0af7651916cd43dd")
        engine.finish(bad)
        assert "failed, of requests 0af7651916cd43dd" in caplog.text
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


def test_a_model_that_cannot_run_is_never_ready() -> None:
    class Broken(TableExecutor):
        def forward(self, batch: Any) -> torch.Tensor:
            raise RuntimeError(f"no kernel for {batch.num_tokens} tokens")

    loop = EngineLoop(Broken(), RecordingListener(), CONFIG)
    with pytest.raises(EngineError, match="the model cannot run: no kernel for"):
        loop.run(lambda: pytest.fail("ready"))
