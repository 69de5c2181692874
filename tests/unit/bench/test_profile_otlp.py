"""Spans of a profile: who calls whom, when, and in a form that collectors take."""

import http.server
import json
import threading
from typing import Any

from scalellm.bench.plan import Level
from scalellm.bench.profile import LevelProfile, Profile
from scalellm.bench.profile_otlp import Span, export, profile_spans
from scalellm.bench.profile_told import ReplicaSteps
from scalellm.bench.target import TargetClient

from .test_profile_stages import told

ID = "00000000000000ab0000000000000007"
COLUMNS = (
    "outcome", "start_ms", "ttft_ms", "e2e_ms", "input_tokens", "output_tokens", "status", "id",
)  # fmt: skip
STEP = {
    "number": 3, "started_us": 1_010_000, "requests": 2, "tokens": 9,
    "phases_us": {"schedule": 100, "forward": 900},
}  # fmt: skip


def profile() -> Profile:
    """Two requests, of which the gateway tells one; one step."""
    rows = [
        ["completed", 5.0, 50.0, 95.0, 7, 11, 200, ID],
        ["reset", 6.0, None, 3.0, None, 0, None, "0" * 31 + "8"],
        ["overload", 6.0, None, 0.0, None, 0, None, None],
    ]
    row = {"started_us": 990_000, "records": {"columns": COLUMNS, "rows": rows}}
    replica = ReplicaSteps("unix:/e", (STEP,), None)
    level = LevelProfile(
        Level(concurrency=1, requests=2), row, None, None, (told(id=ID),), (replica,), ()
    )
    return Profile({"model": "m"}, {}, {"endpoint": "completions"}, (level,))


def of_name(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.slice.name == name]
    return found


def test_a_requests_spans_hang_below_the_span_it_was_sent_as() -> None:
    spans = list(profile_spans(profile()))
    clients = [span for span in spans if span.service == "scalellm-bench"]
    assert [span.span_id for span in clients] == ["0000000000000007", "0000000000000008"]
    assert [span.status for span in clients] == [1, 2]
    request, decode = of_name(spans, "request"), of_name(spans, "decode")
    assert (request.trace_id, request.parent_id) == (ID, clients[0].span_id)
    assert (decode.trace_id, decode.parent_id) == (ID, request.span_id)
    assert clients[0].slice.start_us == 995_000
    assert clients[0].slice.took_us == 95_000


def test_a_steps_spans_are_a_trace_of_the_replica() -> None:
    spans = list(profile_spans(profile()))
    root, step = of_name(spans, "steps of unix:/e"), of_name(spans, "step 3")
    forward = of_name(spans, "forward")
    assert root.trace_id not in (ID, "") and root.parent_id == ""
    assert (step.parent_id, forward.parent_id) == (root.span_id, step.span_id)
    assert (forward.slice.start_us, forward.slice.took_us) == (1_010_100, 900)


def test_ids_times_and_numbers_are_posted_as_otlp_wants_them() -> None:
    posted: list[tuple[str, dict[str, Any]]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, json.loads(body)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        number = export(profile(), TargetClient(f"http://127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, document),) = posted
    assert path == "/v1/traces"
    services = {}
    for entry in document["resourceSpans"]:
        (name,) = entry["resource"]["attributes"]
        services[name["value"]["stringValue"]] = entry["scopeSpans"][0]["spans"]
    assert set(services) == {"scalellm-bench", "scalellm-gateway", "scalellm-engine"}
    assert sum(len(spans) for spans in services.values()) == number
    span = services["scalellm-bench"][0]
    assert (span["traceId"], span["spanId"], span["parentSpanId"]) == (ID, ID[16:], "")
    assert span["startTimeUnixNano"] == "995000000"
    assert span["endTimeUnixNano"] == "1090000000"
    attributes = {entry["key"]: entry["value"] for entry in span["attributes"]}
    assert attributes["gen_ai.usage.output_tokens"] == {"intValue": "11"}
    assert attributes["scalellm.ttft_ms"] == {"doubleValue": 50.0}
    assert attributes["gen_ai.request.model"] == {"stringValue": "m"}
