"""A profile as OpenTelemetry spans, posted to a collector by OTLP over HTTP in JSON.

    bench     POST /v1/completions          a trace for each request: its id is the request's id
    gateway     └─ request                  and was sent as W3C `traceparent`, so that an endpoint
    gateway          ├─ accept, parse, ...  with tracing of its own adds its spans to the same trace
    gateway          └─ decode
    engine    steps of REPLICA              a trace for each replica and level
    engine      └─ step 17
    engine           └─ schedule, forward, ...

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from scalellm.bench.profile import LevelProfile, Profile
from scalellm.bench.profile_slices import Slice, request_slices, step_slices
from scalellm.bench.profile_told import ReplicaSteps, RequestTimes
from scalellm.bench.records import Records
from scalellm.bench.target import TargetClient

_PATH = "/v1/traces"
_SPANS_A_POST = 1000
_INTERNAL, _SERVER, _CLIENT = 1, 2, 3  # SpanKind
_OK, _ERROR = 1, 2  # Status.StatusCode
_SPAN_ID_DIGITS, _TRACE_ID_BYTES = 16, 16
_ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def _new_span_id() -> str:
    return secrets.token_hex(_SPAN_ID_DIGITS // 2)


@dataclass(frozen=True, slots=True)
class Span:
    """One span, of the service that spent the time."""

    service: str
    trace_id: str
    slice: Slice
    parent_id: str = ""
    span_id: str = field(default_factory=_new_span_id)
    kind: int = _INTERNAL
    status: int = _OK

    def child(self, part: Slice, service: str, kind: int = _INTERNAL) -> "Span":
        return Span(service, self.trace_id, part, self.span_id, kind=kind)

    def to_json(self) -> dict[str, Any]:
        part = self.slice
        return {
            "traceId": self.trace_id,
            "spanId": self.span_id,
            "parentSpanId": self.parent_id,
            "name": part.name,
            "kind": self.kind,
            "startTimeUnixNano": str(part.start_us * 1000),
            "endTimeUnixNano": str((part.start_us + part.took_us) * 1000),
            "attributes": _attributes(part.about),
            "status": {"code": self.status},
        }


def export(profile: Profile, collector: TargetClient) -> int:
    """Post all spans; how many. Raises EndpointError."""
    number = 0
    every = profile_spans(profile)
    while spans := list(islice(every, _SPANS_A_POST)):
        collector.call("POST", _PATH, document(spans))
        number += len(spans)
    return number


def profile_spans(profile: Profile) -> Iterator[Span]:
    path = _ROUTES[profile.workload["endpoint"]]
    for level in profile.levels:
        yield from _request_spans(level, f"POST {path}", profile.target["model"])
        for replica in level.replicas:
            yield from _step_spans(replica)


def document(spans: Iterable[Span]) -> dict[str, Any]:
    """An ExportTraceServiceRequest."""
    services: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        services.setdefault(span.service, []).append(span.to_json())
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes({"service.name": service})},
                "scopeSpans": [{"scope": {"name": "scalellm.profile"}, "spans": found}],
            }
            for service, found in services.items()
        ]
    }


def _request_spans(level: LevelProfile, name: str, model: str) -> Iterator[Span]:
    told = {request["id"]: request for request in level.requests}
    for measured in Records.of(level.row).by_start():
        trace_id = measured["id"]
        if trace_id is None:
            continue  # never sent
        about = {
            # https://opentelemetry.io/docs/specs/semconv/gen-ai/
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": measured["input_tokens"],
            "gen_ai.usage.output_tokens": measured["output_tokens"],
            "scalellm.ttft_ms": measured["ttft_ms"],
            "scalellm.outcome": measured["outcome"],
            "http.response.status_code": measured["status"],
        }
        start_us = level.row["started_us"] + round(measured["start_ms"] * 1000)
        whole = Slice(name, start_us, round(measured["e2e_ms"] * 1000), about)
        span_id = trace_id[-_SPAN_ID_DIGITS:]
        status = _OK if measured["outcome"] == "completed" else _ERROR
        client = Span("scalellm-bench", trace_id, whole, "", span_id, _CLIENT, status)
        yield client
        if trace_id in told:
            yield from _gateway_spans(client, told[trace_id])


def _gateway_spans(client: Span, request: RequestTimes) -> Iterator[Span]:
    whole, *stages = request_slices(request)
    span = client.child(whole, "scalellm-gateway", _SERVER)
    yield span
    for stage in stages:
        yield span.child(stage, "scalellm-gateway")


def _step_spans(replica: ReplicaSteps) -> Iterator[Span]:
    if not replica.steps:
        return
    steps: Sequence[list[Slice]] = [list(step_slices(step)) for step in replica.steps]
    start_us = min(step[0].start_us for step in steps)
    end_us = max(step[0].start_us + step[0].took_us for step in steps)
    about = {"scalellm.replica": replica.replica}
    whole = Slice(f"steps of {replica.replica}", start_us, end_us - start_us, about)
    root = Span("scalellm-engine", secrets.token_hex(_TRACE_ID_BYTES), whole)
    yield root
    for slices in steps:
        step = root.child(slices[0], "scalellm-engine")
        yield step
        for phase in slices[1:]:
            yield step.child(phase, "scalellm-engine")


def _attributes(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": name, "value": _value(value)} for name, value in about.items() if value is not None
    ]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": str(value)}
