"""Which requests a step takes, under fixed and random workloads."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.engine.kv_cache import KVCache
from scalellm.engine.request import Request, Status
from scalellm.engine.scheduler import FLOOR_CHUNK_TOKENS, Scheduler
from scalellm.engine.step import Limits, Step
from scalellm.engine.step_time import StepShape, StepTime

from .machine import LIMITS, Machine, alone, next_token, prompt_of


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


def test_the_more_context_a_prompt_has_the_fewer_of_its_tokens_streams_wait_for() -> None:
    times = StepTime()
    for tokens, context in [(1, 0), (64, 0), (64, 4000), (500, 100), (900, 8000), (1, 900)] * 6:
        shape = StepShape().with_span(context, tokens)
        times.observe(shape, 20.0 + shape.tokens + 1e-3 * shape.attended)
    scheduler = Scheduler(Limits(4, 512, 20_000, step_budget_ms=1.0), KVCache(2000, 16), times)
    scheduler.add(Request(key=1, prompt_ids=[3], max_tokens=9_000), 0)
    scheduler.update(scheduler.schedule(0), [7], 0)
    scheduler.add(Request(key=2, prompt_ids=[4] * 19_000, max_tokens=1), 0)
    floor_ms = times.predict_ms(StepShape().with_span(0, FLOOR_CHUNK_TOKENS)) - 20.0
    chunks = []
    while 2 in scheduler.requests:
        step = scheduler.schedule(0)
        chunks.append(step.shape.tokens - 1)
        alone_ms = times.predict_ms(StepShape().with_span(step.spans[0].start, 1))
        if chunks[-1] > 4:
            assert step.predicted_ms - alone_ms < 1.3 * floor_ms  # tokens are whole ones
        ends = step.spans[1].start + chunks[-1] == 19_000
        scheduler.update(step, [7, 9 if ends else None], 0)
    assert chunks[0] == FLOOR_CHUNK_TOKENS and chunks[-2] == 4


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


def test_an_answer_begun_elsewhere_is_caught_up_with_at_once_beside_streams() -> None:
    times = StepTime()
    for tokens in [1, 64, 500] * 6:
        times.observe(StepShape().with_span(0, tokens), 1.0 + 0.1 * tokens)
    machine = Machine(replace(LIMITS, step_budget_ms=20.0, max_model_len=300), blocks=400)
    machine.scheduler.step_time = times
    machine.add(1, [1] * 4, 100, eos_token_ids=frozenset())
    machine.step()
    machine.add(2, [2] * 60, 2, arrival_us=1)
    machine.step()
    fresh = machine.scheduler.requests[2]
    begun = fresh.num_computed_tokens
    assert 0 < begun < 50
    resumed = machine.add(3, [3] * 50, 60, resume_ids=[4, 5], arrival_us=2)
    step = machine.step()
    assert step.keys[:2] == (1, 3) and resumed.num_computed_tokens >= 52
    assert fresh.num_computed_tokens - begun < 20
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
