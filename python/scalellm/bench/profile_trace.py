"""A profile as a trace for chrome://tracing or ui.perfetto.dev.

gateway     one row a request that runs at the time: request > stages
replica     one row: step > phases; and how many requests each step computed
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scalellm.bench.profile import Profile
from scalellm.bench.profile_told import ReplicaSteps, RequestTimes

_GATEWAY = 1
_BEFORE_FIRST = (
    "accept", "auth", "body", "parse", "admission", "text_queue", "template", "tokenise", "route",
    "link_out", "queue", "prefill", "emit", "link_back",
)  # fmt: skip

Event = dict[str, Any]


def write_trace(profile: Profile, path: Path) -> None:
    """All levels after each other, on the hosts' clocks."""
    requests = [request for level in profile.levels for request in level.requests]
    replicas = [replica for level in profile.levels for replica in level.replicas]
    document = {"displayTimeUnit": "ms", "traceEvents": list(_events(requests, replicas))}
    path.write_text(json.dumps(document), encoding="utf-8")


def _events(requests: Sequence[RequestTimes], replicas: Sequence[ReplicaSteps]) -> Iterator[Event]:
    starts = [request["started_us"] for request in requests]
    starts += [step["started_us"] for replica in replicas for step in replica.steps]
    origin_us = min(starts, default=0)
    yield _process_name(_GATEWAY, "gateway: requests")
    ends_us: list[int] = []
    for request in sorted(requests, key=lambda request: request["started_us"]):
        row = _free_row(ends_us, request["started_us"])
        ends_us[row] = request["started_us"] + request["stages_us"]["total"]
        yield from _request_events(request, row, origin_us)
    names = list(dict.fromkeys(replica.replica for replica in replicas))
    for process, name in enumerate(names, _GATEWAY + 1):
        yield _process_name(process, f"engine {name}: steps")
        for replica in replicas:
            if replica.replica == name:
                for step in replica.steps:
                    yield from _step_events(step, process, origin_us)


def _free_row(ends_us: list[int], start_us: int) -> int:
    for row, end_us in enumerate(ends_us):
        if end_us <= start_us:
            return row
    ends_us.append(0)
    return len(ends_us) - 1


def _request_events(request: RequestTimes, row: int, origin_us: int) -> Iterator[Event]:
    stages = request["stages_us"]
    at_us = request["started_us"] - origin_us
    about = {
        "id": request["id"],
        "prompt_tokens": request["prompt_tokens"],
        "cached_tokens": request["cached_tokens"],
        "output_tokens": request["output_tokens"],
        "replica": request["replica"],
    }
    yield _slice("request", _GATEWAY, row, at_us, stages["total"], about)
    stage_at_us = at_us
    for stage in _BEFORE_FIRST:
        took_us = stages.get(stage, 0)
        if took_us:
            phases = (request["engine"] or {}).get("prefill_us") if stage == "prefill" else None
            yield _slice(stage, _GATEWAY, row, stage_at_us, took_us, phases)
        stage_at_us += took_us
    first_us, last_us = stages.get("first"), request["last_tokens_us"]
    if first_us is not None and last_us is not None and last_us > first_us:
        phases = (request["engine"] or {}).get("decode_us")
        yield _slice("decode", _GATEWAY, row, at_us + first_us, last_us - first_us, phases)


def _step_events(step: Any, process: int, origin_us: int) -> Iterator[Event]:
    at_us = step["started_us"] - origin_us
    phases = step["phases_us"]
    about = {"requests": step["requests"], "tokens": step["tokens"]}
    whole_us = sum(phases.values())
    yield _slice(f"step {step['number']}", process, 0, at_us, whole_us, about)
    yield {"ph": "C", "name": "batch", "pid": process, "ts": at_us, "args": about}
    for phase, took_us in phases.items():
        yield _slice(phase, process, 0, at_us, took_us, None)
        at_us += took_us


def _slice(name: str, process: int, row: int, at_us: int, took_us: int, about: Any) -> Event:
    event = {"ph": "X", "name": name, "pid": process, "tid": row, "ts": at_us, "dur": took_us}
    return event | ({"args": dict(about)} if about else {})


def _process_name(process: int, name: str) -> Event:
    return {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
