"""The loop on its threads, with an executor that reads what the KV blocks hold."""

import math
import os
import random
import threading
import time
from typing import Any

import pytest
import torch

from scalellm.engine.calibration import write_blocks
from scalellm.engine.loop import EngineLoop
from scalellm.engine.worker import Worker
from scalellm.executor.batch import Batch

from .table_engine import (
    CONFIG,
    EOS,
    VOCAB,
    RecordingListener,
    TableExecutor,
    continuation,
    next_token,
    running,
    wait_until,
)


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


def test_blocks_to_be_read_are_all_written_first() -> None:
    batches = list(write_blocks([3, 1, 4, 5, 9], 2))
    assert [len(batch.spans) for batch in batches] == [2, 2, 1]
    spans = [span for batch in batches for span in batch.spans]
    assert [tuple(span.block_table) for span in spans] == [(3,), (1,), (4,), (5,), (9,)]
    assert {(span.start, len(span.token_ids), span.num_logits) for span in spans} == {(0, 1, 0)}


def test_calibration_times_the_shapes_that_fit() -> None:
    executor = TableExecutor()
    with running(executor) as engine:
        engine.listener.command("calibrate", (9, [(4, 8, 0), (0, 0, 32), (2, 5, 10), (500, 1, 1)]))
        ticket, times_ms = engine.listener.calibrated.get(timeout=30)
        assert ticket == 9 and all(ms > 0 for ms in times_ms[:3]) and math.isnan(times_ms[3])
        assert engine.loop.scheduler.kv.num_used == 0


def test_the_loop_warms_up_before_it_is_ready_and_leaves_no_block_taken() -> None:
    executor = TableExecutor()
    loop = EngineLoop(executor, RecordingListener(), CONFIG)
    used: list[int] = []

    def ready() -> None:
        used.append(loop.scheduler.kv.num_used)
        loop.stop()

    loop.run(ready)
    assert used == [0]


def test_compute_threads_give_way_to_the_others() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with Worker[int](nice=3) as worker:
        worker.start(niceness)
        done = None
        while done is None:
            done = worker.wait(1.0)
    assert done.result == niceness() + 3
