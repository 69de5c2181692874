"""What is measured beside arrivals and lengths, and what it changes about a decision."""

from dataclasses import replace

import pytest

from scalellm.controller.blueprint.policy import (
    OBJECTIVES,
    Objective,
    Settings,
    State,
    decide,
    demand_of,
)
from scalellm.controller.blueprint.predict import Demand, predict
from scalellm.controller.blueprint.signals import Signals

from .test_policy import NARROW, NODE, PROMPTS, WIDE, signals


def outlook_scores(found: Signals, state: State, objective: Objective) -> dict[str, float]:
    decision, _ = decide(found, state, (NARROW, WIDE), NODE, Settings(objective))
    return {str(blueprint): score for blueprint, score in decision.scores}


def test_prompts_that_wait_to_be_computed_delay_the_next_one() -> None:
    demand = Demand(1.0, 8.0, 0.0, PROMPTS, 64.0)
    for blueprint in (NARROW, WIDE):
        (group,) = blueprint.groups
        behind = predict(blueprint, replace(demand, backlog_tokens=64_000.0), NODE, 60.0)
        free = predict(blueprint, demand, NODE, 60.0)
        # 500 prompts of 128, shared by the replicas
        waits_ms = 500 * NODE.shapes[group.tp].cost.prompt_ms(128.0) / group.count
        assert behind.ttft_ms[0] - free.ttft_ms[0] == pytest.approx(waits_ms, rel=0.05)
        assert behind.tbt_ms == free.tbt_ms
    idle, busy = signals(WIDE, 8, 1.0), replace(signals(WIDE, 8, 1.0), backlog_tokens=64_000)
    for plan, score in outlook_scores(busy, State(0.0), "slo").items():
        assert score < outlook_scores(idle, State(0.0), "slo")[plan]


def test_streams_that_hold_more_memory_than_their_lengths_say_leave_fewer_places() -> None:
    shape = NODE.shapes[1]
    full = replace(signals(NARROW, 80, 1.0), kv_use=0.9)
    demand = demand_of(full, NODE, Settings())
    assert demand.held_tokens == pytest.approx(0.9 * 8 * shape.kv_tokens / 80)
    assert shape.streams(demand.held_tokens) == pytest.approx(10 / 0.9)
    found = predict(NARROW, demand, NODE, 60.0)
    roomy = predict(NARROW, replace(demand, seen_held_tokens=0.0), NODE, 60.0)
    assert found.capacity_requests_s < roomy.capacity_requests_s / 2
    empty = demand_of(replace(full, kv_use=0.0), NODE, Settings())
    assert empty.held_tokens == empty.context_tokens


def test_a_measured_ttft_corrects_that_of_every_shape() -> None:
    settings = Settings("slo", ttft_slo_ms=100.0)
    found, state = signals(WIDE, 8, 1.0), State(0.0)
    predicted_ms = predict(WIDE, demand_of(found, NODE, settings), NODE, 60.0).ttft_ms[2]
    before = outlook_scores(found, state, "slo")
    for second in range(100):
        late = replace(found, now_s=100.0 + second, ttft_ms=3 * predicted_ms)
        _, state = decide(late, state, (NARROW, WIDE), NODE, settings)
    assert state.ttft_factor == pytest.approx(3.0, rel=0.01)
    after = outlook_scores(found, state, "slo")
    assert all(after[plan] < before[plan] for plan in before)
    for other in ({"waiting": 3}, {"backlog_tokens": 900}, {"arrivals_s": 1e3}):
        crowded = replace(found, ttft_ms=predicted_ms, **other)
        after_that = decide(crowded, state, (NARROW, WIDE), NODE, settings)[1]
        assert after_that.ttft_factor == state.ttft_factor
    absurd = replace(found, ttft_ms=1e3 * predicted_ms)
    assert decide(absurd, state, (NARROW, WIDE), NODE, settings)[1].ttft_factor == state.ttft_factor


def test_a_switch_costs_what_switches_were_seen_to_cost() -> None:
    settings = Settings("throughput")
    busy = signals(WIDE, 56, 0.0)
    state = State(0.0, left=NARROW)
    for pause_ms in (19_000.0, 200.0):
        for second in range(70):
            now = replace(busy, now_s=100.0 + second, pause_ms=pause_ms)
            _, state = decide(now, state, (NARROW, WIDE), NODE, settings)
        assert state.pause_ms is not None
        assert state.pause_ms == pytest.approx(pause_ms, rel=0.1)
        needed = 2 * max(0.1, state.pause_ms / 1e3 / settings.horizon_s)
        decision, _ = decide(busy, state, (NARROW, WIDE), NODE, settings)
        assert decision.reason.endswith(f"a switch needs {needed:.1%}")
    absurd = replace(busy, now_s=1000.0, pause_ms=40_000.0)
    assert decide(absurd, state, (NARROW, WIDE), NODE, settings)[1].pause_ms == state.pause_ms


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_pause_pins_a_shape_for_good(objective: Objective) -> None:
    """The longest that is believed, on the way back, leaves room for a gain there can be."""
    settings = Settings(objective, ttft_slo_ms=400.0, tbt_slo_ms=20.0)
    state = State(0.0, left=NARROW, pause_ms=20_000.0)
    crowd = replace(signals(WIDE, 1024, 120.0), waiting=1000, backlog_tokens=128_000)
    switched = False
    for second in range(60):
        now = replace(crowd, now_s=100.0 + second)
        decision, state = decide(now, state, (NARROW, WIDE), NODE, settings)
        switched = switched or decision.switch
    assert switched


def test_places_that_stay_empty_slow_nobody() -> None:
    """Beyond its capacity a shape with more places is no worse for having them."""

    def request_ms(places: int, requests_s: float) -> float:
        shape = replace(NODE.shapes[1], max_num_seqs=places)
        made = replace(NODE, shapes={1: shape})
        demand = Demand(requests_s, 64.0, 30.0, PROMPTS, 64.0)
        outlook = predict(NARROW, demand, made, 60.0)
        assert outlook.load > 1.0
        return outlook.request_ms(64.0)

    for requests_s in (250.0, 300.0, 400.0):
        assert request_ms(512, requests_s) < request_ms(256, requests_s)
