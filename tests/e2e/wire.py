"""HTTP with no a client library: what is on the wire, and what the endpoint says of its load."""

import http.client
import json
import socket
import urllib.parse
from dataclasses import dataclass
from email.message import Message
from typing import Any

from scalellm.controller.gateway_view import get, parse_metrics

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response."""

    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of OpenAI's envelope, which has to have its form."""
        envelope = self.json()
        assert list(envelope) == ["error"], envelope
        error: dict[str, Any] = envelope["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"]
        return error

    def events(self) -> list[Any]:
        """The data of each SSE event; "[DONE]" stays text."""
        frames = self.body.decode().split("\n\n")
        assert frames.pop() == ""
        data = [frame.removeprefix("data: ") for frame in frames]
        return [text if text == "[DONE]" else json.loads(text) for text in data]


def connect(url: str, timeout_s: float = TIMEOUT_S) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)


def raw_socket(url: str) -> socket.socket:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)


def call(
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
) -> Reply:
    """One request on a connection of its own; a body that is not bytes is sent as JSON."""
    payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = connect(url)
    try:
        connection.request(
            method or ("GET" if body is None else "POST"), path, payload, headers or {}
        )
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


def complete(url: str, **fields: Any) -> Reply:
    """A completion of the demo model, unless `fields` says otherwise."""
    return call(url, "/v1/completions", {"model": "demo", "prompt": "Once", **fields})


def chat(url: str, **fields: Any) -> Reply:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}
    return call(url, "/v1/chat/completions", {**asked, **fields})


def load(url: str) -> dict[str, float]:
    """Sums over replicas of the endpoint's metrics, by name without prefix."""
    answer = get(url, "/metrics")
    assert answer is not None and answer.status == http.client.OK
    found: dict[str, float] = {}
    for sample in parse_metrics(answer.body):
        name = sample.name.removeprefix("scalellm_").removeprefix("replica_")
        found[name] = found.get(name, 0.0) + sample.value
    return found


AT_REST = (
    "generations_in_flight",
    "in_flight_requests",
    "running_requests",
    "waiting_requests",
    "kv_blocks_used",
)


def is_at_rest(url: str) -> bool:
    """Whether nothing is computed and no KV block belongs to anybody."""
    found = load(url)
    return all(found[name] == 0 for name in AT_REST)
