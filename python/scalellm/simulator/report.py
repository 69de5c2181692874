"""What came of a simulation: the figures of `bench`, and those only a simulation knows.

TTFT counts from the send, TBT is (last - first) / (n - 1), goodput are the requests a second that
met every objective; requests that failed met nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.simulator.cluster import Run, Served

SCHEMA = 1
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Upper bounds of one request."""

    ttft_ms: float
    tbt_ms: float

    def is_met(self, served: Served) -> bool:
        if served.failed or served.ttft_ms > self.ttft_ms:
            return False
        return math.isnan(served.tbt_ms) or served.tbt_ms <= self.tbt_ms


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in figures."""

    plan: str
    requests: int
    failed: int
    span_s: float
    output_tok_s: float
    request_s: float
    ttft_ms: Mapping[str, float]
    tbt_ms: Mapping[str, float]
    e2e_ms: Mapping[str, float]
    met: float  # share of requests
    goodput_request_s: float  # over the time in which requests were sent
    utilisation: float  # of all devices' time
    switches: int
    switch_gap_ms: Mapping[str, float]  # of moved requests, between two tokens
    preemptions: int
    steps: int

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def summarise(plan: str, run: Run, objectives: Objectives, sent_s: float) -> Summary:
    """`sent_s`: for how long requests were sent, which goodput is over."""
    served = run.served
    done = [one for one in served if not one.failed]
    met = sum(objectives.is_met(one) for one in served)
    span_s = run.span_ms / 1e3
    tokens = sum(one.output_tokens for one in done)
    devices = run.blueprint.devices
    return Summary(
        plan,
        len(served),
        len(served) - len(done),
        span_s,
        _per(tokens, span_s),
        _per(len(done), span_s),
        percentiles([one.ttft_ms for one in done]),
        percentiles([one.tbt_ms for one in done]),
        percentiles([one.end_ms - one.send.at_ms for one in done]),
        _per(met, len(served)),
        _per(met, min(sent_s, span_s)),
        _per(run.busy_device_ms, run.span_ms * devices),
        len(run.switches),
        percentiles(run.gaps_ms),
        run.preemptions,
        run.steps,
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and max of what is a number; zeros where nothing is."""
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return {**{f"p{rank}": 0.0 for rank in _PERCENTILES}, "max": 0.0}
    ranks = np.percentile(found, _PERCENTILES)
    named = {f"p{rank}": float(value) for rank, value in zip(_PERCENTILES, ranks, strict=True)}
    return {**named, "max": float(max(found))}


def _per(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0


HEAD = (
    "plan",
    "requests",
    "failed",
    "tok/s",
    "TTFT ms p50 / p99",
    "TBT ms p50 / p99",
    "met",
    "goodput/s",
    "used",
    "switches",
)


def cells(summary: Summary) -> list[str]:
    """One line of the table under HEAD."""
    return [
        summary.plan,
        str(summary.requests),
        str(summary.failed),
        f"{summary.output_tok_s:,.0f}",
        f"{summary.ttft_ms['p50']:,.1f} / {summary.ttft_ms['p99']:,.1f}",
        f"{summary.tbt_ms['p50']:.2f} / {summary.tbt_ms['p99']:.2f}",
        f"{summary.met:.1%}",
        f"{summary.goodput_request_s:.2f}",
        f"{summary.utilisation:.0%}",
        str(summary.switches),
    ]


def document(
    summaries: Sequence[Summary], runs: Sequence[Run], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of `scalellm simulate --json`."""
    rows = []
    for summary, run in zip(summaries, runs, strict=True):
        switches = [
            {
                "at_s": switch.at_ms / 1e3,
                "took_ms": switch.done_ms - switch.at_ms,
                "blueprint": switch.blueprint.to_json(),
                "moved": switch.moved,
            }
            for switch in run.switches
        ]
        rows.append(summary.to_json() | {"switched": switches})
    return {"schema": SCHEMA, **facts, "rows": rows}


def write_json(found: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
