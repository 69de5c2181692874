"""The simulator: closed form against stepping, the scheduler's rules, switches, the command."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from scalellm.bench.lengths import Fixed, LogNormal
from scalellm.bench.plan import Level, Workload
from scalellm.bench.sources import Conversations, Source, Synthetic
from scalellm.cli.main import main
from scalellm.controller.blueprint.cost import Calibration, ShapeCost, StepCost, read_calibration
from scalellm.controller.blueprint.policy import Settings
from scalellm.controller.blueprint.shape import Blueprint, Group, uniform
from scalellm.engine.step_time import StepShape
from scalellm.errors import ConfigError
from scalellm.simulator.cluster import Cluster, Run
from scalellm.simulator.compare import Setup, run_auto, run_static, summary_of
from scalellm.simulator.report import Objectives
from scalellm.simulator.requests import Closed, Load, Open, Send
from scalellm.simulator.step_time import CalibratedStepTime
from scalellm.simulator.stretch import Stretch

NODE = read_calibration("node-8gpu")
NARROW, WIDE = uniform(NODE.widths, 8)
ONE = Blueprint((Group(1, 1),))
THREE = Blueprint((Group(1, 3),))
MIXED = Synthetic(LogNormal(5.0, 1.0, at_most=2000), LogNormal(3.5, 0.8))
SHARED = Synthetic(LogNormal(6.0, 0.8, at_most=2000), Fixed(20), prefix_reuse=0.5)
LONG = Synthetic(Fixed(40), Fixed(150))
TALK = Conversations(Fixed(40), Fixed(30), turns=3, systems=2, system_tokens=64, think_s=0.2)


def small(kv_tokens: int = 4096, slots: int = 8, beside: float = 1.0) -> Calibration:
    cost = StepCost(10.0, 0.5, 1e-3, 0.25)
    shape = ShapeCost(
        1, cost, slots, 256, 100.0, kv_tokens, max_model_len=2048, beside=beside, others=2
    )
    return Calibration("small", "derived", "", {1: shape}, front_ms=1.0, switch_ms=500.0)


def open_load(source: Source, rate: float, seconds: float, seed: int = 0) -> Callable[[], Load]:
    level, workload = Level(rate=rate, duration_s=seconds), Workload(source=source, seed=seed)
    return lambda: Open([(level, workload)], 2048)


def lives(run: Run) -> list[tuple[float, ...]]:
    found = [
        (one.send.at_ms, one.first_ms, one.end_ms, one.output_tokens, one.moves)
        for one in run.served
    ]
    return [tuple(0.0 if math.isnan(value) else value for value in life) for life in found]


SAMPLES: list[tuple[str, Calibration, Blueprint, Callable[[], Load]]] = [
    ("narrow", NODE, NARROW, open_load(MIXED, 60.0, 4.0)),
    ("wide", NODE, WIDE, open_load(MIXED, 30.0, 4.0)),
    ("beyond the crowd", NODE, WIDE, open_load(MIXED, 150.0, 2.0)),
    ("all places taken", small(slots=4), ONE, open_load(MIXED, 8.0, 5.0)),
    ("blocks short, preemptions", small(kv_tokens=512), ONE, open_load(LONG, 3.0, 5.0)),
    ("shared prefixes", small(kv_tokens=8192), ONE, open_load(SHARED, 3.0, 5.0)),
    ("conversations", small(kv_tokens=8192), ONE, open_load(TALK, 2.0, 5.0)),
    ("slower beside others", small(beside=1.3), THREE, open_load(MIXED, 8.0, 5.0)),
    ("closed loop", NODE, NARROW, lambda: Closed(MIXED, 40, 160, None, 2048)),
]


@pytest.mark.parametrize(("calibration", "blueprint", "load"), [s[1:] for s in SAMPLES],
                         ids=[s[0] for s in SAMPLES])  # fmt: skip
def test_stretches_in_closed_form_are_what_stepping_gives(
    calibration: Calibration, blueprint: Blueprint, load: Callable[[], Load]
) -> None:
    quick = Cluster(load(), calibration, blueprint).run()
    exact = Cluster(load(), calibration, blueprint, exact=True).run()
    assert len(quick.served) > 8
    for found, wanted in zip(lives(quick), lives(exact), strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)
    assert (quick.steps, quick.preemptions) == (exact.steps, exact.preemptions)
    assert quick.prefix_hit_tokens == exact.prefix_hit_tokens
    assert quick.busy_device_ms == pytest.approx(exact.busy_device_ms)


def test_the_samples_cover_preemption_and_prefix_hits() -> None:
    by_name = {name: (calibration, plan, load) for name, calibration, plan, load in SAMPLES}
    calibration, plan, load = by_name["blocks short, preemptions"]
    assert Cluster(load(), calibration, plan).run().preemptions > 0
    calibration, plan, load = by_name["shared prefixes"]
    assert Cluster(load(), calibration, plan).run().prefix_hit_tokens > 0


def test_a_single_request_takes_what_its_steps_cost() -> None:
    calibration = small()
    cost = calibration.shapes[1].cost
    load = Closed(Synthetic(Fixed(100), Fixed(5)), 1, 1, None, 2048)
    (served,) = Cluster(load, calibration, ONE).run().served
    prompt_ms = cost.step_ms(100, 100 * 101 / 2, 1, 100)
    assert served.ttft_ms == pytest.approx(calibration.front_ms + prompt_ms)
    decodes = [cost.step_ms(1, 101 + at, 1, 101 + at) for at in range(4)]
    assert served.tbt_ms == pytest.approx(sum(decodes) / 4)


def test_steps_take_longer_while_others_on_the_host_compute() -> None:
    source, cost = Synthetic(Fixed(100), Fixed(50)), small().shapes[1].cost

    def token_ms(clients: int) -> list[float]:
        load = Closed(source, clients, clients, None, 2048)
        return [one.tbt_ms for one in Cluster(load, small(beside=1.5), THREE).run().served]

    alone = sum(cost.step_ms(1, 101 + at, 1, 101 + at) for at in range(49)) / 49
    assert token_ms(1) == pytest.approx([alone])
    # One of the two others computes, both; first and last steps begin, or end, alone.
    assert token_ms(2) == pytest.approx([1.25 * alone] * 2, rel=0.01)
    assert token_ms(3) == pytest.approx([1.5 * alone] * 3, rel=0.01)


def test_a_stretch_is_interrupted_after_the_step_that_runs() -> None:
    stretch = Stretch(0.0, 100, StepShape(), 10.0, 0.5)  # steps of 10, 10.5, 11, ... ms
    assert stretch.end_ms(3) == pytest.approx(31.5)
    for now_ms, begun in ((0.0, 1), (5.0, 1), (10.0, 1), (10.1, 2), (31.5, 3), (31.6, 4)):
        assert stretch.begun_by(now_ms) == begun
    assert stretch.begun_by(1e9) == 100
    assert Stretch(0.0, 100, StepShape(), 10.0, 0.0).begun_by(95.0) == 10


def test_chunks_are_the_largest_that_fit_the_budget() -> None:
    step_time = CalibratedStepTime(StepCost(10.0, 0.5, 1e-3, 0.25))
    beside = StepShape(4, 400.0, 4)
    for start, budget_ms in ((0, 100.0), (500, 100.0), (0, 12.0), (0, 5.0)):
        tokens = step_time.largest_chunk(beside, start, budget_ms)
        assert step_time.predict_ms(beside.with_span(start, tokens + 1)) > budget_ms
        assert tokens == 0 or step_time.predict_ms(beside.with_span(start, tokens)) <= budget_ms


def test_a_full_queue_refuses_and_the_rest_is_served() -> None:
    setup = Setup(small(slots=2), open_load(Synthetic(Fixed(50), Fixed(50)), 400.0, 4.0))
    summary = summary_of("static", run_static(setup, ONE), Objectives(1e9, 1e9))
    assert summary.failed > 0
    assert summary.met == pytest.approx(1 - summary.failed / summary.requests)


class Forced(Cluster):
    """Switches at given times, whatever a policy thinks."""

    forced = ((WIDE, 1500.0), (NARROW, 3500.0))
    made = 0

    def _arrive(self, send: Send, now_ms: float) -> None:
        if self.made < len(self.forced) and now_ms > self.forced[self.made][1]:
            self.switch(self.forced[self.made][0], now_ms)
            self.made += 1
        super()._arrive(send, now_ms)


def test_a_switch_loses_nobody_and_nothing() -> None:
    run = Forced(open_load(MIXED, 60.0, 6.0)(), NODE, NARROW).run()
    calm = Cluster(open_load(MIXED, 60.0, 6.0)(), NODE, NARROW).run()
    assert [switch.blueprint for switch in run.switches] == [WIDE, NARROW]
    assert not any(one.failed for one in run.served)
    wanted = [one.output_tokens for one in calm.served]
    assert [one.output_tokens for one in run.served] == wanted
    assert sum(switch.moved for switch in run.switches) == len(run.gaps_ms)
    assert all(gap >= NODE.switch_ms for gap in run.gaps_ms)


def test_auto_follows_the_load_and_counts_its_switches() -> None:
    levels = [Level(rate=rate, duration_s=20.0) for rate in (4.0, 110.0)]
    source = Synthetic(Fixed(128), Fixed(64))
    setup = Setup(NODE, lambda: Open([(one, Workload(source=source)) for one in levels], 2048))
    run, _ = run_auto(setup, (NARROW, WIDE), NARROW, Settings("latency", min_stay_s=5.0))
    assert [switch.blueprint for switch in run.switches] == [WIDE, NARROW]


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["simulate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command_compares_writes_and_replays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    journal, written = tmp_path / "j.jsonl", tmp_path / "r.json"
    code, out = simulate(
        capsys, "--concurrency", "4,200", "--journal", str(journal), "--json", str(written)
    )
    assert code == 0
    assert "best static plan: 1 x TP 8" in out
    assert "best static plan: 8 x TP 1" in out
    rows = json.loads(written.read_text())["rows"]
    assert [row["plan"] for row in rows] == ["8 x TP 1", "1 x TP 8", "auto"] * 2
    code, out = simulate(capsys, "--replay", str(journal))
    assert (code, "0 taken differently" in out) == (0, True)
    lines = journal.read_text().splitlines()
    last = json.loads(lines[-1])
    last["decision"]["gain"] += 1
    journal.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert simulate(capsys, "--replay", str(journal))[0] == 1


def test_a_day_has_a_window_for_each_hour(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = simulate(
        capsys, "--rate", "4", "--day", "--duration", "2", "--only", "static", "--seed", "1"
    )
    assert code == 0
    assert "4/s on average, a day" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices", "0"], "devices"),
        (["--replica", "tp=8,count=2"], "needs 16 devices, there are 8"),
        (["--replica", "tp=3"], "allowed here: 1, 8"),
        (["--calibration", "nowhere"], "node-8gpu"),
        (["--day"], "--day: needs one --rate"),
        (["--rate", "x"], "--rate: got 'x'"),
        (["--replay", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--objective", "speed"], "latency, throughput, slo"),
    ],
)
def test_bad_input_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    code, out = simulate(capsys, *arguments)
    assert code == 2
    assert named in out


def test_more_replicas_than_the_index_of_prefixes_tells_apart_need_another_routing() -> None:
    many, load = Blueprint((Group(1, 1024),)), open_load(MIXED, 20.0, 1.0)
    with pytest.raises(ConfigError, match="prefix tells at most 128"):
        Cluster(load(), small(), many, routing="prefix")
    run = Cluster(load(), small(), many, routing="least-load").run()
    assert run.served and not any(one.failed for one in run.served)
