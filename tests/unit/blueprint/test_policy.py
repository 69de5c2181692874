"""The blueprint policy: where it moves, where it stays, and that it can be replayed."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.controller.blueprint.cost import (
    Calibration,
    ShapeCost,
    StepCost,
    calibration_toml,
    parse_calibration,
    read_calibration,
    shipped,
)
from scalellm.controller.blueprint.policy import (
    OBJECTIVES,
    Objective,
    Settings,
    State,
    decide,
)
from scalellm.controller.blueprint.predict import Demand, predict, steady_streams
from scalellm.controller.blueprint.shape import (
    Blueprint,
    Group,
    check_fits,
    parse_groups,
    uniform,
)
from scalellm.controller.blueprint.signals import Signals
from scalellm.errors import ConfigError

NODE = read_calibration("node-8gpu")
NARROW, WIDE = uniform(NODE.widths, 8)
PROMPTS = (128.0,) * 5


def signals(blueprint: Blueprint, running: int, arrivals_s: float, now_s: float = 100.0) -> Signals:
    return Signals(now_s, blueprint, running, 0, 0, 0.1, arrivals_s, PROMPTS, 64.0)


def settled(
    blueprint: Blueprint, running: int, objective: str, arrivals_s: float = 0.0
) -> Blueprint:
    """Where the policy is after a minute of the same load."""
    settings = Settings(next(name for name in OBJECTIVES if name == objective))
    state = State(0.0)
    for now_s in range(60):
        found = signals(blueprint, running, arrivals_s, float(now_s))
        decision, state = decide(found, state, (NARROW, WIDE), NODE, settings)
        blueprint = decision.blueprint
    return blueprint


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("begin", [NARROW, WIDE])
def test_few_streams_get_the_wide_replica_and_many_the_narrow_ones(
    objective: str, begin: Blueprint
) -> None:
    assert settled(begin, 8, objective) == WIDE
    assert settled(begin, 256, objective) == NARROW


def test_the_published_figures_come_out_of_the_derived_calibration() -> None:
    def tok_s(blueprint: Blueprint, streams: int) -> float:
        (group,) = blueprint.groups
        step_ms = NODE.shapes[group.tp].cost.decode_ms(max(1, streams / group.count), 0)
        return 1e3 * streams / step_ms

    assert tok_s(WIDE, 1) == pytest.approx(185, rel=0.01)
    assert tok_s(NARROW, 1) == pytest.approx(146, rel=0.01)
    assert tok_s(WIDE, 1024) == pytest.approx(5200, rel=0.01)
    assert tok_s(NARROW, 2048) == pytest.approx(17000, rel=0.01)
    assert tok_s(WIDE, 40) > tok_s(NARROW, 40)
    assert tok_s(WIDE, 56) < tok_s(NARROW, 56)


def test_objectives_decide_where_only_one_shape_meets_them() -> None:
    tight = Settings("slo", ttft_slo_ms=1000, tbt_slo_ms=6.2)
    decision, _ = decide(signals(NARROW, 4, 2.0), State(0.0), (NARROW, WIDE), NODE, tight)
    scores = dict(decision.scores)
    assert scores[WIDE] > 0.5 > scores[NARROW]


def test_stays_where_both_meet_the_objectives() -> None:
    for begin in (NARROW, WIDE):
        assert settled(begin, 8, "slo", arrivals_s=5.0) == begin


def test_leaves_a_shape_that_meets_nothing_for_one_that_comes_nearer() -> None:
    assert settled(WIDE, 1000, "slo", arrivals_s=400.0) == NARROW


def play(
    loads: Sequence[int], settings: Settings, seconds_each: int = 1
) -> list[tuple[float, Blueprint]]:
    """The switches of a run over such concurrencies."""
    blueprint, state, switches = WIDE, State(0.0), []
    for at, running in enumerate(loads):
        now_s = float(at * seconds_each)
        decision, state = decide(
            signals(blueprint, running, 0.0, now_s), state, (NARROW, WIDE), NODE, settings
        )
        if decision.switch:
            blueprint = decision.blueprint
            switches.append((now_s, blueprint))
    return switches


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("middle", [40, 47, 55])
def test_noise_around_the_crossover_moves_it_once_at_most(seed: int, middle: int) -> None:
    draw = random.Random(seed)
    loads = [max(1, round(draw.gauss(middle, 8))) for _ in range(3600)]
    assert len(play(loads, Settings("latency"))) <= 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_never_switches_more_often_than_the_minimum_stay_allows(objective: str) -> None:
    draw = random.Random(1)
    loads = [draw.choice([1, 2000]) for _ in range(200) for _ in range(8)]
    settings = Settings(next(name for name in OBJECTIVES if name == objective), min_stay_s=60.0)
    times = [at for at, _ in play(loads, settings)]
    assert all(later - sooner >= 60.0 for sooner, later in pairwise(times))


def test_a_lasting_change_moves_it_exactly_once_each_way() -> None:
    loads = [1] * 120 + [256] * 120 + [1] * 120
    assert [found for _, found in play(loads, Settings("latency"))] == [NARROW, WIDE]


def test_a_switch_that_does_not_repay_is_not_made() -> None:
    dear = replace(NODE, switch_ms=60_000.0)
    decision, _ = decide(
        signals(WIDE, 70, 0.0), State(0.0), (NARROW, WIDE), dear, Settings("latency")
    )
    assert decision.gain > 0.1
    assert not decision.switch
    assert "a switch needs" in decision.reason


def test_a_measured_slowness_of_the_machine_moves_nothing() -> None:
    """All shapes are taken to be as slow as the one that runs."""
    state = State(0.0)
    for now_s in range(300):
        found = replace(signals(WIDE, 20, 0.0, float(now_s)), tbt_ms=20.0)
        decision, state = decide(found, state, (NARROW, WIDE), NODE, Settings("latency"))
        assert not decision.switch
    assert state.factors[8] > 2.0


def test_engines_own_steps_correct_the_calibration_before_any_request_ends() -> None:
    cost = NODE.shapes[8].cost
    fitted = (1.5 * cost.base_ms, 0.0, 0.0, 1.5 * (cost.per_token_ms + cost.per_sequence_ms))
    state = State(0.0)
    for now_s in range(100):
        found = replace(signals(WIDE, 4, 0.0, float(now_s)), step_cost=fitted, tbt_ms=1e3)
        decision, state = decide(found, state, (NARROW, WIDE), NODE, Settings("latency"))
        assert not decision.switch
    assert state.factors[8] == pytest.approx(1.5, rel=0.05)


def test_nothing_is_decided_before_anything_was_measured() -> None:
    nothing = Signals(5.0, WIDE, 0, 0, 0, 0.0, 0.0, (), 0.0)
    decision, _ = decide(nothing, State(0.0), (NARROW, WIDE), NODE, Settings())
    assert (decision.blueprint, decision.switch) == (WIDE, False)


@given(
    objective=st.sampled_from(OBJECTIVES),
    running=st.integers(0, 5000),
    waiting=st.integers(0, 5000),
    arrivals_s=st.floats(0, 1e5),
    prompt=st.floats(1, 1e6),
    output=st.floats(0.01, 1e5),
    tbt_ms=st.one_of(st.none(), st.floats(0, 1e6)),
    ttft_ms=st.one_of(st.none(), st.floats(0, 1e9)),
    pause_ms=st.one_of(st.none(), st.floats(0, 1e9)),
    backlog=st.integers(0, 10**9),
    kv_use=st.floats(0, 1),
    present=st.sampled_from([NARROW, WIDE]),
)
def test_any_load_gets_a_decision(
    objective: Objective,
    running: int,
    waiting: int,
    arrivals_s: float,
    prompt: float,
    output: float,
    tbt_ms: float | None,
    ttft_ms: float | None,
    pause_ms: float | None,
    backlog: int,
    kv_use: float,
    present: Blueprint,
) -> None:
    found = Signals(
        *(1.0, present, running, waiting, backlog, kv_use, arrivals_s, (prompt,) * 5, output),
        *(ttft_ms, tbt_ms, None, pause_ms),
    )
    decision, _ = decide(found, State(0.0), (NARROW, WIDE), NODE, Settings(objective))
    assert math.isfinite(decision.gain)
    assert decision.switch == (decision.blueprint != present)


def test_a_thousand_devices_are_a_handful_of_candidates() -> None:
    """Eleven widths are eleven predictions, however many devices there are."""
    widths = [1 << power for power in range(11)]
    many = replace(NODE, shapes={tp: replace(NODE.shapes[8], tp=tp) for tp in widths})
    plans = uniform(widths, 1024)
    assert len(plans) == 11
    decision, _ = decide(signals(plans[0], 5000, 400.0), State(0.0), plans, many, Settings())
    assert len(decision.scores) == 11


def test_steady_streams_are_what_arrives_while_one_lasts() -> None:
    shape = NODE.shapes[1]
    demand = Demand(4.0, 0.0, 0.0, (500.0,), 200.0)
    streams = steady_streams(shape, demand)
    prompt_share = 4.0 * shape.cost.prompt_ms(500) / 1e3
    tbt_s = shape.cost.decode_ms(streams, 600.0) / (1 - prompt_share) / 1e3
    assert streams == pytest.approx(4.0 * 200.0 * tbt_s)
    overloaded = replace(demand, requests_s=50.0)
    assert steady_streams(shape, overloaded) == math.inf
    assert predict(Blueprint((Group(1, 1),)), overloaded, NODE, 60.0).load > 1


def test_groups_are_read_from_flags_and_from_a_variable() -> None:
    wanted = Blueprint((Group(2, 1), Group(1, 2)))
    assert parse_groups(["tp=1,count=2", "tp=2,count=1"]) == wanted
    assert parse_groups(["tp=1", "count=2", "tp=2"]) == wanted
    assert str(wanted) == "1 x TP 2 + 2 x TP 1"
    for bad in ("tp=0", "count=2", "tp=1,count=x", "tp=1,size=2", "", "tp=2000"):
        with pytest.raises(ConfigError, match="allowed: tp=WIDTH,count=NUMBER"):
            parse_groups([bad])


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"needs 16 devices, there are 8; .*8 x TP 1, 1 x TP 8"):
        check_fits(Blueprint((Group(8, 2),)), 8, NODE.widths, "--replica")
    with pytest.raises(ConfigError, match="got tp=3, allowed here: 1, 8"):
        check_fits(Blueprint((Group(3, 1),)), 8, NODE.widths, "--replica")


def test_a_calibration_reads_back_as_it_was_written() -> None:
    cost = StepCost(20.5, 1.25, 3e-5, 0.5, 0.25, 8, 4e-6, 5)
    shape = ShapeCost(2, cost, 64, 2048, 800.0, 32_768)
    written = Calibration("a", "measured", 'b "c"', {2: shape}, 1.5, 250.0)
    assert parse_calibration(calibration_toml(written, "why\n\nso"), "test") == written
    for name in shipped():
        assert read_calibration(name).source in ("measured", "derived")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name = 1", "shapes"),
        ("nonsense", "Expected"),
        ('name = "a"\nsource = "b"\nnote = ""\nshapes = []', "at least one"),
        (calibration_toml(NODE).replace("base_ms = 5.336", "base_ms = -1"), "at least 0"),
    ],
)
def test_a_bad_calibration_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_calibration(text, "file.toml")
