"""An endpoint in this process whose every answer a test can set."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# Self-made, for localhost, until 2126, with its key; no authority (CA:FALSE).
CERTIFICATE = Path(__file__).with_name("localhost.pem")


@dataclass
class Behaviour:
    """How the endpoint behaves, and what it was asked."""

    models: list[str] = field(default_factory=lambda: ["tiny"])
    owned_by: str = "somebody"
    closes_unsaid: bool = False
    has_tokenize: bool = True
    template_tokens: int = 0  # special tokens and chat template around the text
    letters_a_token: int = 100  # a word of more letters is several tokens
    takes_ids: bool = True
    gives_usage: bool = True
    token_gap_s: float = 0.0
    max_model_len: int | None = None
    hang_after: int | None = None  # requests
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def count(self, text: str) -> int:
        pieces = (-(-len(word) // self.letters_a_token) for word in text.split())
        return self.template_tokens + sum(pieces)


class FakeEndpoint:
    def __init__(self, certificate: Path | None = None) -> None:
        """`certificate`: with its key, to speak https."""
        self.behaviour = Behaviour()
        self.stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            # Shaking hands is for a connection's own thread.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        begin = "http://127.0.0.1" if certificate is None else "https://localhost"
        self.url = f"{begin}:{self._server.server_port}"

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    endpoint: FakeEndpoint

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        behaviour = self.endpoint.behaviour
        if self.path == "/v1/models":
            common = {"owned_by": behaviour.owned_by, "max_model_len": behaviour.max_model_len}
            entries = [{"id": name, **common} for name in behaviour.models]
            self.answer(200, {"data": entries})
        else:
            self.answer(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        behaviour = self.endpoint.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("model") not in behaviour.models:
            self.answer(404, {"error": {"message": f"no model {body.get('model')!r}"}})
        elif self.path == "/tokenize" and behaviour.has_tokenize:
            self.answer(200, {"tokens": [0] * behaviour.count(_text(body))})
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            self.generate(body, behaviour)
        else:
            self.answer(404, {"error": {"message": "no such path"}})

    def generate(self, body: dict[str, Any], behaviour: Behaviour) -> None:
        if isinstance(body.get("prompt"), list) and not behaviour.takes_ids:
            self.answer(400, {"error": {"message": "prompt: a string is allowed"}})
            return
        behaviour.bodies.append(body)
        prompt_tokens = (
            len(body["prompt"])
            if isinstance(body.get("prompt"), list)
            else behaviour.count(_text(body))
        )
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            choice = {"text": "x", "finish_reason": "length"}
            self.answer(200, {"choices": [choice], "usage": usage})
            return
        if behaviour.hang_after is not None and len(behaviour.bodies) > behaviour.hang_after:
            self.endpoint.stopped.wait()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            time.sleep(behaviour.token_gap_s)
            choice = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
            self.event(json.dumps({"choices": [choice]}))
        if behaviour.gives_usage:
            self.event(json.dumps({"choices": [], "usage": usage}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = behaviour.closes_unsaid

    def event(self, data: str) -> None:
        text = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))


def _text(body: dict[str, Any]) -> str:
    messages = body.get("messages", [{"content": body.get("prompt")}])
    return " ".join(str(message["content"]) for message in messages)


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()
    yield fake
    fake.stop()


@pytest.fixture
def secure_endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint(CERTIFICATE)
    yield fake
    fake.stop()
