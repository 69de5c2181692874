"""What a simulated policy is told: no more than a gateway would tell a real one."""

import math
import re
from pathlib import Path

import pytest

from scalellm.bench.lengths import Fixed
from scalellm.bench.plan import Level, Workload
from scalellm.bench.sources import Synthetic
from scalellm.controller.blueprint.cost import read_calibration
from scalellm.controller.blueprint.journal import Policy
from scalellm.controller.blueprint.policy import Decision, Settings
from scalellm.controller.blueprint.shape import Blueprint, uniform
from scalellm.controller.blueprint.signals import Signals
from scalellm.simulator.cluster import Cluster
from scalellm.simulator.metrics import BOUNDS_S, Histogram
from scalellm.simulator.requests import Open

ROOT = Path(__file__).resolve().parents[3]
NODE = read_calibration("node-8gpu")
NARROW, WIDE = uniform(NODE.widths, 8)


class Told(Policy):
    """A policy that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(NODE, Settings(), (NARROW,), 0.0)
        self.signals: list[Signals] = []

    def decide(self, signals: Signals, barred: tuple[Blueprint, ...] = ()) -> Decision:
        self.signals.append(signals)
        return super().decide(signals, barred)


def told(rate: float, output: int = 64) -> list[Signals]:
    """Of a minute of prompts of 128 tokens."""
    policy, workload = Told(), Workload(source=Synthetic(Fixed(128), Fixed(output)))
    load = Open([(Level(rate=rate, duration_s=60.0), workload)], 2048)
    Cluster(load, NODE, NARROW, policy=policy).run()
    return policy.signals


def test_histograms_have_the_gateways_bounds() -> None:
    source = (ROOT / "crates/gateway/src/metrics.rs").read_text(encoding="utf-8")
    found = re.search(r"const BOUNDS_S: \[f64; \d+\] = \[(.*?)\];", source, re.DOTALL)
    assert found
    assert [float(bound) for bound in re.findall(r"[\d._]+", found[1])] == list(BOUNDS_S)


def test_a_histogram_counts_as_the_gateways_does() -> None:
    histogram = Histogram()
    for ms in (0.01, 0.9, 1.0, 70_000.0, math.nan):  # the gateway's own test's
        histogram.observe_ms(ms)
    found = histogram.cumulative()
    assert (found[0.000_01], found[0.001], found[60.0], found[math.inf]) == (1, 3, 3, 4)


def test_signals_are_those_of_counters_and_buckets() -> None:
    last = told(20.0)[-1]
    assert last.prompt_tokens == (128.0,) * 5
    assert last.output_tokens == 64.0
    assert last.arrivals_s == pytest.approx(20.0, rel=0.3)
    assert last.tbt_ms == pytest.approx(1e3 * math.sqrt(0.005 * 0.01))
    assert last.step_cost is not None
    assert last.step_cost[0] == pytest.approx(NODE.shapes[1].cost.base_ms, rel=0.1)


def test_nothing_is_known_of_a_request_before_it_ends() -> None:
    found = told(1.0, output=1000)  # of some six seconds each
    first = next(at for at, one in enumerate(found) if one.prompt_tokens)
    assert first >= 4
    assert all(one.ttft_ms is None for one in found[:first])
    assert any(one.running for one in found[:first])
