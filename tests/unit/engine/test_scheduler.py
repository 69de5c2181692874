"""The scheduler under fixed and random workloads; its model reads what the KV blocks hold."""

import random
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.engine.kv_cache import KVCache
from scalellm.engine.request import Request, Status
from scalellm.engine.scheduler import FLOOR_CHUNK_TOKENS, Scheduler
from scalellm.engine.step import Limits, Step
from scalellm.engine.step_time import StepShape, StepTime

EOS = 0
LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, step_budget_ms=1e9)


def next_token(context: list[int], remembers: int = 1000) -> int:
    """A model: a function of what it remembers, EOS now and then; of two ids it repeats itself."""
    return zlib.crc32(repr(context[-remembers:]).encode()) % 23


class Machine:
    """Runs a scheduler's steps: writes ids into blocks, samples from what the blocks hold."""

    def __init__(
        self,
        limits: Limits = LIMITS,
        blocks: int = 32,
        block_size: int = 4,
        remembers: int = 1000,
        **kv: bool,
    ):
        self.remembers = remembers
        self.further: dict[int, list[int]] = {}
        self.kv = KVCache(blocks, block_size, **kv)
        self.scheduler = Scheduler(limits, self.kv)
        self.memory = [[-1] * block_size for _ in range(blocks)]
        self.steps: list[Step] = []
        self.now_us = 1000
        self.done: dict[int, Request] = {}
        self.errors: dict[int, str | None] = {}
        self.emitted: dict[int, list[int]] = {}

    def compute(self, step: Step) -> list[int | None]:
        size = self.kv.block_size
        written = [
            block
            for span in step.spans
            for block in span.block_table[
                span.start // size : -(-(span.start + len(span.token_ids)) // size)
            ]
        ]
        assert len(set(written)) == len(written), "two spans write one block"
        sampled: list[int | None] = []
        self.further = {}
        for key, span in zip(step.keys, step.spans, strict=True):
            for position, token in enumerate(span.token_ids, span.start):
                self.memory[span.block_table[position // size]][position % size] = token
            end = span.start + len(span.token_ids)
            held = [self.memory[span.block_table[i // size]][i % size] for i in range(end)]
            request = self.scheduler.requests[key]
            known = end - span.num_drafts
            assert held[:known] == request.token_ids[:known], "another sequence's tokens"
            assert known == request.num_tokens or not span.num_drafts, "drafts inside a sequence"
            if known < request.num_tokens:
                sampled.append(None)
                continue
            assert span.num_logits >= 1 + span.num_drafts
            ids = [
                next_token(held[: known + i], self.remembers) for i in range(1 + span.num_drafts)
            ]
            right = 0
            while right < span.num_drafts and ids[right] == held[known + right]:
                right += 1
            sampled.append(ids[0])
            self.further[key] = ids[1 : 1 + right]
        return sampled

    def step(self) -> Step:
        self.now_us += 10
        step = self.scheduler.schedule(self.now_us)
        self.scheduler.check_integrity()
        assert step.shape.tokens <= self.scheduler.limits.max_num_batched_tokens
        assert len(step.keys) <= self.scheduler.limits.max_num_seqs
        assert step.keys or not self.scheduler.requests, "requests, and no work for any of them"
        if step.keys:
            sampled = self.compute(step)
            self.scheduler.update(step, sampled, self.now_us, None, self.further)
        self.collect()
        self.steps.append(step)
        return step

    def collect(self) -> None:
        self.scheduler.check_integrity()
        for output in self.scheduler.take_outputs():
            key = output.request.key
            assert key not in self.done, "output after the end"
            self.emitted.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.done[key] = output.request
                self.errors[key] = output.error

    def run(self, limit: int = 5000) -> None:
        while self.scheduler.requests:
            assert len(self.steps) < limit, "requests do not finish"
            self.step()
        self.collect()

    def add(self, key: int, prompt: list[int], max_tokens: int, **more: object) -> Request:
        request = Request(
            key=key,
            prompt_ids=prompt,
            max_tokens=max_tokens,
            **{"eos_token_ids": frozenset({EOS}), **more},  # type-checked by the dataclass's users
        )
        self.scheduler.add(request, self.now_us)
        return request


def alone(
    prompt: list[int], max_tokens: int, max_model_len: int, remembers: int = 1000
) -> list[int]:
    """What one request gives without scheduler or cache."""
    context = list(prompt)
    while len(context) - len(prompt) < max_tokens and len(context) < max_model_len:
        context.append(next_token(context, remembers))
        if context[-1] == EOS:
            break
    return context[len(prompt) :]


def prompt_of(rng: random.Random, families: list[list[int]], longest: int) -> list[int]:
    head = rng.choice(families)
    tail = [rng.randrange(1, 23) for _ in range(rng.randrange(1, 12))]
    return ([*head[: rng.randrange(len(head) + 1)], *tail])[:longest]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([1, 2, 4, 5]),
    st.sampled_from([0, 1, 5]),
)
def test_random_workloads_finish_exactly_and_leak_nothing(
    seed: int, max_preemptions: int, prefix_caching: bool, block_size: int, max_drafts: int
) -> None:
    rng = random.Random(seed)
    remembers = rng.choice([2, 1000])
    limits = Limits(
        max_num_seqs=rng.randrange(1, 9),
        max_num_batched_tokens=rng.choice([9, 33, 64]),
        max_model_len=48,
        step_budget_ms=1e9,
        max_preemptions=max_preemptions,
        max_drafts=max_drafts,
    )
    blocks = rng.choice([1, 2, 3, 6]) * -(-48 // block_size)
    machine = Machine(limits, blocks, block_size, remembers, prefix_caching=prefix_caching)
    families = [[rng.randrange(1, 23) for _ in range(30)] for _ in range(3)]
    expected: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    for key in range(rng.randrange(1, 25)):
        prompt = prompt_of(rng, families, 40)
        max_tokens = rng.randrange(1, 30)
        resume = alone(prompt, max_tokens, 48, remembers)[: rng.choice([0, 0, 0, 2])]
        machine.add(
            key,
            prompt,
            max_tokens,
            resume_ids=resume,
            priority=rng.choice([0, 0, 1, 2]),
            arrival_us=machine.now_us,
            cache_salt=rng.choice([b"", b"tenant"]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
        )
        expected[key] = alone(prompt, max_tokens, 48, remembers)[len(resume) :]
        for _ in range(rng.randrange(3)):
            machine.step()
        if rng.random() < 0.1:
            cancelled.add(victim := rng.randrange(key + 1))
            machine.scheduler.cancel(victim, machine.now_us)
            machine.collect()
    machine.run()
    assert machine.kv.num_used == 0
    for key, tokens in expected.items():
        request = machine.done[key]
        assert request.status is Status.FINISHED and request.preemptions <= max_preemptions
        if request.finish_reason == "cancelled":
            assert key in cancelled and machine.emitted[key] == tokens[: len(machine.emitted[key])]
        else:
            assert machine.emitted[key] == tokens, request.finish_reason


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_equal_inputs_give_equal_decisions(seed: int) -> None:
    def decisions() -> list[Step]:
        rng = random.Random(seed)
        machine = Machine(blocks=40)
        for key in range(12):
            machine.add(key, [rng.randrange(1, 9) for _ in range(rng.randrange(1, 50))], 20)
            machine.step()
        machine.run()
        return machine.steps

    assert decisions() == decisions()


def test_decodes_go_first_and_a_long_prompt_does_not_stall_them() -> None:
    machine = Machine(replace(LIMITS, max_model_len=2000), blocks=600)
    stream = machine.add(1, [5], 40, eos_token_ids=frozenset())
    machine.step()
    machine.add(2, [7] * 1000, 1)
    while 2 in machine.scheduler.requests and 1 in machine.scheduler.requests:
        before = stream.num_output_tokens
        step = machine.step()
        assert stream.num_output_tokens == before + 1
        assert step.keys[0] == 1 and step.shape.tokens <= 64


def test_chunks_shrink_with_context_so_that_predicted_time_stays_within_the_budget() -> None:
    times = StepTime()
    for tokens, context in [(1, 0), (64, 0), (64, 4000), (500, 100), (900, 8000), (1, 900)] * 6:
        shape = StepShape().with_span(context, tokens)
        times.observe(shape, 1.0 + 0.05 * shape.tokens + 2e-5 * shape.attended)
    limits = Limits(4, 4096, 20_000, step_budget_ms=40.0)
    scheduler = Scheduler(limits, KVCache(2000, 16), times)
    scheduler.add(Request(key=1, prompt_ids=[3] * 19_000, max_tokens=1), 0)
    chunks = []
    while scheduler.requests:
        step = scheduler.schedule(0)
        chunks.append(step.shape.tokens)
        if step.shape.tokens > FLOOR_CHUNK_TOKENS:
            assert step.predicted_ms <= 40.0
        last = step.spans[0].start + chunks[-1] == 19_000
        scheduler.update(step, [9 if last else None], 0)
    assert chunks[0] > 2 * chunks[-2] and chunks[:-1] == sorted(chunks[:-1], reverse=True)


def test_a_prompt_beside_streams_at_most_doubles_their_step() -> None:
    times = StepTime()
    for tokens, context in [(1, 0), (64, 0), (64, 4000), (500, 100), (900, 8000), (1, 900)] * 6:
        shape = StepShape().with_span(context, tokens)
        times.observe(shape, 50.0 + 0.1 * shape.tokens)
    for budget_ms, allowed_ms in [(40.0, 2 * 50.1), (1600.0, 200.0)]:
        limits = Limits(4, 4096, 20_000, step_budget_ms=budget_ms)
        scheduler = Scheduler(limits, KVCache(2000, 16), times)
        scheduler.add(Request(key=1, prompt_ids=[3], max_tokens=9), 0)
        scheduler.update(scheduler.schedule(0), [7], 0)
        scheduler.add(Request(key=2, prompt_ids=[4] * 9_000, max_tokens=1), 0)
        step = scheduler.schedule(0)
        assert step.keys == (1, 2)
        assert 0.9 * allowed_ms < step.predicted_ms <= allowed_ms + 0.2


def test_a_prompt_advances_by_the_floor_when_the_budget_is_already_spent() -> None:
    times = StepTime()
    for _ in range(20):
        times.observe(StepShape(1, 1.0, 1), 500.0)
    scheduler = Scheduler(Limits(4, 512, 512, step_budget_ms=1.0), KVCache(100, 16), times)
    scheduler.add(Request(key=1, prompt_ids=[3] * 100, max_tokens=1), 0)
    assert scheduler.schedule(0).shape.tokens == FLOOR_CHUNK_TOKENS


def test_priority_then_arrival_decides_who_is_admitted() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=1))
    for key, priority, arrival in [(1, 1, 5), (2, 0, 9), (3, 0, 7), (4, 1, 4)]:
        machine.add(key, [key] * 3, 4, priority=priority, arrival_us=arrival)
    machine.run()
    assert list(machine.done) == [3, 2, 4, 1]


def test_the_latest_of_lowest_priority_is_preempted_and_continues_exactly() -> None:
    machine = Machine(replace(LIMITS, max_model_len=40), blocks=12)
    ordinary: dict[str, object] = {"eos_token_ids": frozenset()}
    for key, priority in [(1, 0), (2, 1), (3, 1)]:
        machine.add(key, [key] * 8, 24, priority=priority, arrival_us=key, **ordinary)
    preempted: list[int] = []
    while machine.scheduler.requests:
        preempted += machine.step().preempted
    assert preempted[0] == 3 and 1 not in preempted
    for key in (1, 2, 3):
        context = [key] * 8
        for _ in range(24):
            context.append(next_token(context))
        assert machine.emitted[key] == context[8:]


def test_urgent_requests_displace_less_urgent_ones_when_blocks_or_places_lack() -> None:
    for limits, blocks in [(replace(LIMITS, max_num_seqs=2), 64), (LIMITS, 16)]:
        machine = Machine(replace(limits, max_model_len=64), blocks=blocks)
        for key in (1, 2):
            machine.add(key, [key] * 28, 30, priority=5, eos_token_ids=frozenset())
        machine.step()
        machine.add(3, [3] * 20, 2, priority=0, eos_token_ids=frozenset())
        step = machine.step()
        assert 3 in step.keys and step.preempted == (2,)
        machine.run()
        assert next(iter(machine.done)) == 3 and len(machine.emitted[2]) == 30


def test_a_protected_request_keeps_its_blocks_to_the_end() -> None:
    machine = Machine(replace(LIMITS, max_preemptions=1, max_model_len=64), blocks=16)
    for key in range(6):
        machine.add(key, [key + 1] * 10, 40, arrival_us=key, eos_token_ids=frozenset())
    machine.run()
    assert machine.scheduler.num_preemptions > 0
    assert all(request.preemptions <= 1 for request in machine.done.values())
    assert all(len(tokens) == 40 for tokens in machine.emitted.values())


def test_a_stream_of_new_requests_does_not_starve_an_old_one() -> None:
    machine = Machine(replace(LIMITS, max_model_len=64), blocks=16)
    machine.add(0, [9] * 40, 20, arrival_us=0, eos_token_ids=frozenset())
    for key in range(1, 200):
        machine.add(key, [key % 20 + 1] * 6, 12, arrival_us=key)
        machine.step()
        if 0 in machine.done:
            break
    assert 0 in machine.done


def test_a_shared_prefix_is_computed_once_even_when_all_arrive_together() -> None:
    machine = Machine(blocks=64)
    prefix = list(range(1, 21)) * 2
    for key in range(6):
        machine.add(key, [*prefix, key + 1], 2, eos_token_ids=frozenset())
    machine.run()
    computed = sum(step.shape.tokens for step in machine.steps)
    assert computed == 41 + 5 * 1 + 6
    assert [machine.done[key].cached_tokens for key in range(6)] == [0, 40, 40, 40, 40, 40]
    assert machine.scheduler.prefix_hit_tokens == 200


def test_an_urgent_prompt_goes_before_the_rest_of_a_long_less_important_one() -> None:
    machine = Machine(blocks=200)
    machine.add(1, [1] * 120, 2, priority=1)
    machine.step()
    machine.add(2, [2] * 20, 2, priority=0)
    machine.add(3, [3] * 20, 2, priority=1)
    assert machine.step().keys == (2, 1)
    machine.run()


@pytest.mark.parametrize(("priority", "waits"), [(0, False), (1, True), (2, True)])
def test_nobody_waits_for_a_prefix_that_a_less_important_request_computes(
    priority: int, waits: bool
) -> None:
    machine = Machine(replace(LIMITS, max_num_batched_tokens=40), blocks=200)
    prompt = list(range(1, 21)) * 5
    machine.add(1, prompt, 2, priority=1)
    machine.step()
    machine.add(2, prompt, 2, priority=priority)
    assert (2 in machine.step().keys) is not waits
    machine.run()
    assert machine.emitted[1] == machine.emitted[2]


def test_a_whole_cached_prompt_leaves_a_token_to_compute() -> None:
    machine = Machine()
    machine.add(1, [4] * 8, 1)
    machine.run()
    machine.add(2, [4] * 8, 1)
    assert machine.step().shape.tokens == 4
    assert machine.done[2].cached_tokens == 4


def test_salts_keep_tenants_apart() -> None:
    machine = Machine()
    for key, salt in [(1, b"a"), (2, b"b"), (3, b"a")]:
        machine.add(key, [4] * 9, 1, cache_salt=salt)
        machine.run()
    assert [machine.done[key].cached_tokens for key in (1, 2, 3)] == [0, 0, 8]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty; it must have at least 1 token"),
        ([1] * 128, "the prompt has 128 tokens; at most 127 fit"),
    ],
)
def test_what_can_never_run_ends_with_a_clear_error(prompt: list[int], message: str) -> None:
    machine = Machine()
    request = machine.add(1, prompt, 5)
    machine.collect()
    assert request.finish_reason == "error" and message in str(machine.errors[1])


def test_a_cache_smaller_than_the_model_length_bounds_prompt_and_output() -> None:
    machine = Machine(blocks=4)
    machine.add(1, [1] * 16, 5)
    machine.add(2, [1] * 10, 50, eos_token_ids=frozenset())
    machine.run()
    assert "at most 15 fit" in str(machine.errors[1])
    assert machine.done[2].finish_reason == "length" and len(machine.emitted[2]) == 6


def test_a_full_queue_refuses() -> None:
    machine = Machine(replace(LIMITS, max_waiting=2))
    for key in range(3):
        machine.add(key, [1], 1)
    machine.collect()
    assert "queue is full: 2 requests" in str(machine.errors[2])


def test_cancel_works_in_every_state() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=1))
    for key in (1, 2):
        machine.add(key, [key] * 30, 9)
    scheduler = machine.scheduler
    step = scheduler.schedule(0)
    scheduler.cancel(2, 0)
    scheduler.cancel(1, 0)
    scheduler.cancel(77, 0)
    assert set(scheduler.requests) == {1}, "blocks being written must not be given away"
    scheduler.update(step, machine.compute(step), 0)
    scheduler.cancel(1, 0)
    machine.collect()
    assert {key: r.finish_reason for key, r in machine.done.items()} == {
        1: "cancelled",
        2: "cancelled",
    }
    assert machine.kv.num_used == 0 and machine.emitted[1] == []


def test_deadlines_end_waiting_and_running_requests() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=1))
    machine.add(1, [1], 90, deadline_us=1100, eos_token_ids=frozenset())
    machine.add(2, [1], 90, deadline_us=1050)
    machine.run()
    assert {r.key: (r.finish_reason, r.finished_us) for r in machine.done.values()} == {
        2: ("deadline", 1050),
        1: ("deadline", 1100),
    }


def test_a_failed_step_ends_its_requests_and_nobody_else() -> None:
    machine = Machine(replace(LIMITS, max_num_seqs=2))
    for key in (1, 2, 3):
        machine.add(key, [key] * 5, 2)
    step = machine.scheduler.schedule(0)
    machine.scheduler.fail(step, "the device is gone", 0)
    machine.collect()
    assert machine.errors == {1: "the device is gone", 2: "the device is gone"}
    machine.run()
    assert len(machine.emitted[3]) > 0 and machine.kv.num_used == 0


def test_an_error_of_one_row_ends_that_request_alone() -> None:
    machine = Machine()
    for key in (1, 2):
        machine.add(key, [key] * 5, 3, eos_token_ids=frozenset())
    step = machine.scheduler.schedule(0)
    machine.scheduler.update(step, [None, 4], 0, errors={1: "logits are not finite"})
    machine.collect()
    assert machine.errors == {1: "logits are not finite"} and machine.emitted[2] == [4]


def test_resumed_ids_count_as_output() -> None:
    machine = Machine()
    request = machine.add(1, [1, 2], 3, resume_ids=[5, 6], eos_token_ids=frozenset())
    done = machine.add(2, [1, 2], 2, resume_ids=[5, 6])
    machine.run()
    assert machine.emitted[1] == [next_token([1, 2, 5, 6])] and request.finish_reason == "length"
    assert machine.emitted[2] == [] and done.finish_reason == "length"


def test_min_tokens_keeps_stop_ids_from_ending_a_request() -> None:
    request = Request(1, [1], 9, min_tokens=2, stop_token_ids=frozenset({7}))
    request.token_ids += [7]
    assert request.finish_after_last(100) is None
    request.token_ids += [7]
    assert request.finish_after_last(100) == "stop_token"


def test_prompt_logprobs_ask_for_every_position_once_and_never_skip_any() -> None:
    machine = Machine(replace(LIMITS, max_num_batched_tokens=16))
    machine.add(1, [3] * 40, 1)
    machine.run()
    machine.add(2, [3] * 40, 1, prompt_logprobs=1)
    rows = []
    while machine.scheduler.requests:
        step = machine.step()
        rows.append((step.spans[0].start, step.spans[0].num_logits))
    assert rows == [(0, 16), (16, 16), (32, 8)]


def test_schedule_before_update_is_refused() -> None:
    machine = Machine()
    machine.add(1, [1], 1)
    machine.scheduler.schedule(0)
    with pytest.raises(RuntimeError, match=r"before the last step's update"):
        machine.scheduler.schedule(0)


def test_a_token_budget_below_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least max_num_seqs, 8"):
        Limits(8, 4, 100, 1.0)


def test_text_that_repeats_itself_takes_fewer_steps_with_drafts() -> None:
    plain = Machine(replace(LIMITS, max_model_len=400), blocks=200, remembers=2)
    guessing = Machine(replace(LIMITS, max_model_len=400, max_drafts=7), 200, remembers=2)
    for machine in (plain, guessing):
        machine.add(1, [3, 4, 5], 300, eos_token_ids=frozenset())
        machine.run()
    assert plain.emitted == guessing.emitted
    assert len(plain.steps) == 300 and len(guessing.steps) < 120


def test_wrong_drafts_are_given_up_and_tried_again_later() -> None:
    machine = Machine(replace(LIMITS, max_model_len=2000, max_drafts=3), blocks=600)
    # The text repeats itself in places, but what follows is always new.
    machine.add(1, [token for token in range(1, 23) for _ in range(4)], 1)
    machine.run()
    request = machine.add(2, [5] * 8, 1200, eos_token_ids=frozenset())
    machine.run()
    drafted = [sum(span.num_drafts for span in step.spans) for step in machine.steps]
    assert request.num_output_tokens == 1200
    assert 0 < sum(drafted) < 120
    assert any(drafted[-400:])


def test_drafts_stay_within_the_step_and_the_answer() -> None:
    limits = replace(LIMITS, max_num_batched_tokens=12, max_drafts=7)
    machine = Machine(limits, blocks=200, remembers=2)
    for key in range(8):
        machine.add(key, [3, 4, 5], 60 + key, eos_token_ids=frozenset())
    machine.run()
    assert all(step.shape.tokens <= 12 for step in machine.steps)
    assert [len(machine.emitted[key]) for key in range(8)] == [60 + key for key in range(8)]
    assert any(span.num_drafts for step in machine.steps for span in step.spans)


def test_a_stop_among_accepted_drafts_ends_the_answer_there() -> None:
    context = [3, 4, 5]
    while len(context) < 63:
        context.append(next_token(context, remembers=2))
    text = context[3:]
    stopping = frozenset({text[45]})
    machine = Machine(replace(LIMITS, max_drafts=7), blocks=200, remembers=2)
    more = {"eos_token_ids": frozenset(), "stop_token_ids": stopping, "min_tokens": 40}
    machine.add(1, [3, 4, 5], 60, **more)
    machine.run()
    end = next(place for place in range(39, 60) if text[place] in stopping) + 1
    assert machine.emitted[1] == text[:end] and machine.done[1].finish_reason == "stop_token"
    assert any(span.num_drafts > 1 for step in machine.steps for span in step.spans)
