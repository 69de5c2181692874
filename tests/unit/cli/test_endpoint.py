"""The commands that talk to an endpoint, before a scripted one."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from scalellm.cli.answer import show
from scalellm.cli.endpoint import Endpoint, Piece
from scalellm.cli.status import blueprint_lines, report
from scalellm.controller.gateway_view import Answer, parse_metrics
from scalellm.errors import EndpointError


class Scripted(http.server.ThreadingHTTPServer):
    """Streams `events` to whatever is posted, and remembers what was."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.events: list[Any] = []
        self.status = 200
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def says(self, *texts: str) -> None:
        """Answer with these pieces, then usage, then the end."""
        self.events = [
            *({"choices": [{"delta": {"content": text}, "text": text}]} for text in texts),
            {"choices": [], "usage": {"completion_tokens": 2 * len(texts)}},
            "[DONE]",
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        lines = [e if isinstance(e, str) else json.dumps(e) for e in self.server.events]
        self.answer("".join(f"data: {line}\n\n" for line in lines).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SCALELLM_")}
    return subprocess.run(
        [sys.executable, "-m", "scalellm", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean,
    )


def test_a_stream_is_pieces(server: Scripted) -> None:
    server.says("Hel", "lo")
    pieces = list(Endpoint(server.url + "/v1/", "key").stream("/v1/completions", {"prompt": "x"}))
    assert [piece.text for piece in pieces] == ["Hel", "lo", ""]
    assert pieces[-1].completion_tokens == 4
    assert server.keys == ["Bearer key"]
    assert server.bodies[0]["stream"] is True


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([{"choices": []}], "broke off"),
        ([{"error": {"message": "engine gone"}}], "engine gone"),
        (["{"], "makes no sense"),
        (["[1]"], "makes no sense"),
    ],
)
def test_a_bad_stream_is_said_to_be_one(server: Scripted, events: list[Any], expected: str) -> None:
    server.events = events
    with pytest.raises(EndpointError, match=expected):
        list(Endpoint(server.url).stream("/v1/completions", {}))


def test_an_error_status_shows_the_endpoints_message(server: Scripted) -> None:
    server.status = 400
    with pytest.raises(EndpointError, match="400"):
        list(Endpoint(server.url).stream("/v1/completions", {}))


def test_chat_keeps_the_conversation_until_reset(server: Scripted) -> None:
    server.says("Hi", " there")
    lines = "one\ntwo\n/reset\nthree\n/nonsense\n/exit\nnever\n"
    done = run("chat", "--url", server.url, "--system", "be kind", "--max-tokens", "5", stdin=lines)
    assert done.returncode == 0, done.stderr
    asked = [[m["content"] for m in body["messages"]] for body in server.bodies]
    assert asked == [
        ["be kind", "one"],
        ["be kind", "one", "Hi there", "two"],
        ["be kind", "three"],
    ]
    assert all(b["model"] == "first" and b["max_tokens"] == 5 for b in server.bodies)
    assert done.stdout.count("Hi there\n") == 3
    assert "no command /nonsense" in done.stdout


def test_a_failed_turn_is_forgotten_and_ends_a_script(server: Scripted) -> None:
    server.events = [{"error": {"message": "engine gone"}}]
    done = run("chat", "--url", server.url, stdin="one\ntwo\n")
    assert done.returncode == 1
    assert done.stderr == "scalellm chat: engine gone\n"
    assert len(server.bodies) == 1


def test_complete_reads_the_prompt_and_writes_the_answer(server: Scripted) -> None:
    server.says("a", "b")
    done = run("complete", "--url", server.url, "--model", "second", "-", stdin="piped")
    assert (done.returncode, done.stdout) == (0, "ab\n")
    assert server.bodies[0]["prompt"] == "piped"
    assert server.bodies[0]["model"] == "second"


def test_ctrl_c_ends_the_answer_and_closes_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def pieces() -> Iterator[Piece]:
        try:
            yield Piece("so far")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    answer = show(pieces())
    assert answer.interrupted
    assert answer.text == "so far"
    assert closed == [True]
    assert capsys.readouterr().out == "so far"


def test_status_shows_each_replica() -> None:
    metrics = parse_metrics(
        'scalellm_replica_state{model="m",replica="unix:/a",state="ready"} 0\n'
        'scalellm_replica_state{model="m",replica="unix:/a",state="hung"} 1\n'
        'scalellm_replica_running_requests{model="m",replica="unix:/a"} 3\n'
        'scalellm_replica_kv_blocks_used{model="m",replica="unix:/a"} 5\n'
        'scalellm_replica_kv_blocks_total{model="m",replica="unix:/a"} 10\n'
        "scalellm_requests_in_flight 4\n"
    )
    refusal = Answer(503, '{"error": {"message": "no replica"}}')
    lines = report("http://x", refusal, metrics)
    assert lines[0] == "http://x not ready: no replica"
    assert "in flight 4" in lines[1]
    assert lines[3].split()[:4] == ["m", "unix:/a", "hung", "3"]
    assert "50%" in lines[3]


def test_status_shows_each_models_shape() -> None:
    shape = {"mode": "static", "phase": "steady", "blueprint": [{"tp": 1, "count": 2}]}
    only = blueprint_lines(Answer(200, json.dumps(shape | {"model": "a"})))
    assert only == ["blueprint 2 x TP 1 (static), steady"]
    several = {"models": [shape | {"model": "a"}, shape | {"model": "b"}]}
    lines = blueprint_lines(Answer(200, json.dumps(several)))
    assert lines == [f"{name}: blueprint 2 x TP 1 (static), steady" for name in "ab"]
