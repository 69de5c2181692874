"""A request's and a step's time as slices: the whole first, then its parts, one after the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scalellm.bench.profile_told import RequestTimes, StepTimes

_BEFORE_FIRST = (
    "accept", "auth", "body", "parse", "admission", "safety", "text_queue", "template", "tokenise",
    "route", "link_out", "queue", "prefill", "emit", "link_back",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the time of one thing; Unix time."""

    name: str
    start_us: int
    took_us: int
    about: Mapping[str, Any]


def request_slices(request: RequestTimes) -> Iterator[Slice]:
    stages = request["stages_us"]
    start_us = request["started_us"]
    told = ("id", "prompt_tokens", "cached_tokens", "output_tokens", "replica")
    yield Slice("request", start_us, stages["total"], {name: request[name] for name in told})
    engine = request["engine"] or {}
    at_us = start_us
    for stage in _BEFORE_FIRST:
        took_us = stages.get(stage, 0)
        if took_us:
            phases = engine.get("prefill_us") if stage == "prefill" else None
            yield Slice(stage, at_us, took_us, phases or {})
        at_us += took_us
    first_us, last_us = stages.get("first"), request["last_tokens_us"]
    if first_us is not None and last_us is not None and last_us > first_us:
        phases = engine.get("decode_us")
        yield Slice("decode", start_us + first_us, last_us - first_us, phases or {})


def step_slices(step: StepTimes) -> Iterator[Slice]:
    phases = step["phases_us"]
    about = {"requests": step["requests"], "tokens": step["tokens"]}
    at_us = step["started_us"]
    yield Slice(f"step {step['number']}", at_us, sum(phases.values()), about)
    for phase, took_us in phases.items():
        yield Slice(phase, at_us, took_us, {})
        at_us += took_us
