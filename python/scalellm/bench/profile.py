"""Profiles an endpoint: drives load at it, and asks it where the time of that load went."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from scalellm.bench.plan import Level, Workload
from scalellm.bench.profile_outside import Outside, look_from_outside
from scalellm.bench.profile_stages import (
    Joined,
    Waterfall,
    beside,
    between_tokens,
    first_token,
    whole_answer,
)
from scalellm.bench.profile_told import (
    MAX_REQUESTS,
    ReplicaSteps,
    RequestTimes,
    next_request,
    requests_since,
    steps_since,
)
from scalellm.bench.records import Records
from scalellm.bench.results import Row
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.target import PUBLIC_AUTHORITIES, TargetClient, Trust, discover
from scalellm.errors import ConfigError

SCHEMA = 1
_TRACE_PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """One profile run."""

    url: str
    levels: tuple[Level, ...]
    workload: Workload = field(default_factory=Workload)
    model: str | None = None
    api_key: str = field(default="", repr=False)
    admin_key: str = field(default="", repr=False)  # to be told the stages
    trust: Trust = PUBLIC_AUTHORITIES
    baseline: bool = True  # of a foreign endpoint: also measure ScaleLLM's front alone, beside it


@dataclass(frozen=True, slots=True)
class Inside:
    """One level of an endpoint that tells its stages."""

    first: Waterfall
    token: Waterfall | None  # absent if no answer had two tokens
    answer: Waterfall
    beside_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class LevelProfile:
    """One level: what the client measured, and either what the endpoint tells or what shows."""

    level: Level
    row: Row
    inside: Inside | None
    outside: Outside | None
    requests: tuple[RequestTimes, ...]
    replicas: tuple[ReplicaSteps, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A whole run."""

    target: dict[str, Any]
    machine: dict[str, Any]
    workload: dict[str, Any]
    levels: tuple[LevelProfile, ...]

    @property
    def failed(self) -> int:
        return sum(level.row["failed"] + level.row["timed_out"] for level in self.levels)

    @property
    def measured(self) -> bool:
        return all(level.inside is not None or level.outside is not None for level in self.levels)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "target": self.target,
            "machine": self.machine,
            "workload": self.workload,
            "levels": [_level_json(level) for level in self.levels],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def run_profile(options: ProfileOptions, console: Console) -> Profile:
    """Drive each level and take it apart. Raises ConfigError, EndpointError."""
    for level in options.levels:
        if level.requests is not None and level.requests + level.warmup > MAX_REQUESTS:
            raise ConfigError(
                f"requests: got {level.requests}, allowed: up to {MAX_REQUESTS - level.warmup}, "
                "as many as a gateway keeps"
            )
    trust = options.trust
    client = TargetClient(options.url, options.admin_key or options.api_key, trust)
    target = discover(TargetClient(options.url, options.api_key, trust))
    is_scalellm = target.owned_by == "scalellm"
    levels: list[LevelProfile] = []
    about: dict[str, Any] = {}
    for level in options.levels:
        first = next_request(client, is_scalellm)
        profile, about = _profile_level(options, level, client, first, console)
        levels.append(profile)
    return Profile(about["target"], about["machine"], about["workload"], tuple(levels))


def _profile_level(
    options: ProfileOptions,
    level: Level,
    client: TargetClient,
    first: int | None,
    console: Console,
) -> tuple[LevelProfile, dict[str, Any]]:
    began_us = time.time_ns() // 1000
    bench = Options(
        options.url,
        (level,),
        options.workload,
        model=options.model,
        api_key=options.api_key,
        trust=options.trust,
        trace_prefix=secrets.token_hex(_TRACE_PREFIX_BYTES),
    )
    result = run_bench(bench, console)
    row = result.rows[0]
    inside: Inside | None = None
    outside: Outside | None = None
    requests: list[RequestTimes] = []
    replicas: list[ReplicaSteps] = []
    notes: list[str] = []
    if row["completed"] == 0:
        notes.append("no request completed: there is nothing to take apart")
    elif first is None:
        outside = look_from_outside(bench, row, options.baseline, console)
    else:
        completed = {request["id"]: request for request in Records.of(row).completed()}
        requests = requests_since(client, first, completed.keys())
        replicas = steps_since(client, began_us)
        inside = _take_apart([(told, completed[told["id"]]) for told in requests], row)
        notes += _notes(requests, replicas, row)
    about = {
        "target": dict(result.target),
        "machine": dict(result.machine),
        "workload": dict(result.workload),
    }
    found = LevelProfile(
        level, row, inside, outside, tuple(requests), tuple(replicas), tuple(notes)
    )
    return found, about


def _take_apart(requests: Sequence[Joined], row: Row) -> Inside:
    first = first_token(requests)
    token = None if row["tbt_ms"]["mean"] is None else between_tokens(requests)
    tokens = row["output_tokens"] / row["completed"]
    nothing = Waterfall(0.0, 0.0, ())
    return Inside(
        first,
        token,
        whole_answer(first, token or nothing, tokens),
        beside([told for told, _ in requests]),
    )


def _notes(
    requests: Sequence[RequestTimes], replicas: Sequence[ReplicaSteps], row: Row
) -> list[str]:
    notes = [f"{r.replica} tells no steps: {r.problem}" for r in replicas if r.problem]
    if len(requests) < row["completed"]:
        notes.append(f"the gateway tells of {len(requests)} of {row['completed']} requests")
    retried = sum(1 for request in requests if (request["engine"] or {}).get("preemptions"))
    if retried:
        notes.append(f"{retried} requests were preempted: their prefill was computed again")
    return notes


def _level_json(level: LevelProfile) -> dict[str, Any]:
    row = {name: value for name, value in level.row.items() if name != "records"}
    inside, outside = level.inside, level.outside
    found: dict[str, Any] = {
        "concurrency": level.level.concurrency,
        "rate": level.level.rate,
        "row": row,
        "notes": list(level.notes),
        "outside": None if outside is None else outside.to_json(),
    }
    if inside is not None:
        found |= {
            "ttft": _waterfall_json(inside.first),
            "token": None if inside.token is None else _waterfall_json(inside.token),
            "answer": _waterfall_json(inside.answer),
            "beside_ms": inside.beside_ms,
        }
    return found


def _waterfall_json(waterfall: Waterfall) -> dict[str, Any]:
    largest = waterfall.largest
    return {
        "mean_ms": waterfall.whole_ms,
        "inside_ms": waterfall.inside_ms,
        "inside_share": waterfall.inside_share,
        "stages": [
            {
                "place": share.place,
                "stage": share.stage,
                "mean_ms": share.mean_ms,
                "p99_ms": share.p99_ms,
                "share": share.share,
                "without_ms": share.without_ms(waterfall.whole_ms),
            }
            for share in waterfall.shares
        ],
        "largest": None if largest is None else largest.stage,
    }
