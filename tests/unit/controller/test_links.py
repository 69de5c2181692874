"""JSON lines between processes, and what a gateway's metrics say."""

import http.server
import os
import threading
from collections.abc import Iterator

import pytest

from scalellm.controller.channel import MAX_LINE_BYTES, Lines, encode
from scalellm.controller.gateway_view import Sample, get, parse_metrics, replica_states


@pytest.fixture
def pipe() -> Iterator[tuple[Lines, int]]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield Lines(reading), writing
    os.close(reading)
    os.close(writing)


def test_lines_arrive_in_pieces(pipe: tuple[Lines, int]) -> None:
    lines, writing = pipe
    whole = encode({"type": "a"}) + encode({"type": "b", "text": "ü\n"})
    received = []
    for byte in whole:
        os.write(writing, bytes([byte]))
        received += lines.read()
    assert received == [{"type": "a"}, {"type": "b", "text": "ü\n"}]
    assert not lines.closed


def test_what_is_no_object_is_dropped(pipe: tuple[Lines, int]) -> None:
    lines, writing = pipe
    os.write(writing, b'garbage\n[1]\n\n{"a": 1}\n\xff\xfe\n')
    assert lines.read() == [{"a": 1}]


def test_a_line_without_end_is_bounded() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    lines = Lines(reading)
    for _ in range(2 * MAX_LINE_BYTES // 4096):
        os.write(writing, b"x" * 4096)
        lines.read()
    assert len(lines._rest) <= MAX_LINE_BYTES
    os.write(writing, b'\n{"a": 1}\n')
    assert {"a": 1} in lines.read()
    os.close(writing)
    assert lines.read() == []
    assert lines.closed
    os.close(reading)


def test_metrics_are_parsed() -> None:
    text = (
        "# HELP x y\n# TYPE x gauge\n"
        'scalellm_replica_state{replica="unix:/a \\"b\\".sock",model="m",state="ready"} 1\n'
        'scalellm_replica_state{replica="host:1",state="ready"} 0\n'
        'scalellm_replica_state{replica="host:1",state="lost"} 1\n'
        "plain 3e2 1700000000\nbroken{ x\nnumberless y\n"
    )
    samples = parse_metrics(text)
    assert samples[-1] == Sample("plain", {}, 300.0)
    assert replica_states(samples) == {'unix:/a "b".sock': "ready", "host:1": "lost"}


def test_nobody_there_is_none() -> None:
    assert get("http://127.0.0.1:9", "/health") is None


def test_an_answer_has_status_and_body() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        answer = get(f"http://127.0.0.1:{server.server_port}/base", "/ready")
        thread.join()
    assert answer is not None
    assert (answer.status, answer.body) == (503, "/base/ready")
