"""A profile as a trace for chrome://tracing or ui.perfetto.dev.

gateway     one row a request that runs at the time: request > stages
replica     one row: step > phases; and how many requests each step computed
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scalellm.bench.profile import Profile
from scalellm.bench.profile_slices import Slice, request_slices, step_slices
from scalellm.bench.profile_told import ReplicaSteps, RequestTimes, StepTimes

_GATEWAY = 1
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
    for part in request_slices(request):
        yield _slice(part, _GATEWAY, row, origin_us)


def _step_events(step: StepTimes, process: int, origin_us: int) -> Iterator[Event]:
    whole, *phases = step_slices(step)
    yield _slice(whole, process, 0, origin_us)
    at_us = whole.start_us - origin_us
    yield {"ph": "C", "name": "batch", "pid": process, "ts": at_us, "args": dict(whole.about)}
    for phase in phases:
        yield _slice(phase, process, 0, origin_us)


def _slice(part: Slice, process: int, row: int, origin_us: int) -> Event:
    event = {"ph": "X", "name": part.name, "pid": process, "tid": row}
    event |= {"ts": part.start_us - origin_us, "dur": part.took_us}
    return event | ({"args": dict(part.about)} if part.about else {})


def _process_name(process: int, name: str) -> Event:
    return {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
