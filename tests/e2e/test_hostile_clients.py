"""Clients that stall, send too much or leave, keys, and templates that fail or never end.

A second gateway in front of the shared engine has the short limits that this takes.
"""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from scalellm.demo import model_folder

from ..integration.served import START_S, Serve, own_environment
from ..integration.supervised import free_port, until
from .wire import Reply, call, connect, is_at_rest, load, raw_socket

KEY = "sk-right"
BODY_TIMEOUT_S = 1
TEMPLATES = {
    "endless": "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "refusing": "{{ raise_exception('roles must alternate') }}",
    "undefined": "{{ messages[0].nothing.at.all }}",
}


@pytest.fixture(scope="module")
def strict(shared_server: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a gateway with a key, short timeouts, and a model for each of the templates."""
    folder = tmp_path_factory.mktemp("gateway")
    (replica,) = call(shared_server.url, "/admin/v1/replicas").json()["models"][0]["replicas"]
    port = free_port()
    lines = [
        f"port = {port}",
        f'api_keys = ["{KEY}"]',
        f"header_timeout_s = {BODY_TIMEOUT_S}",
        f"body_timeout_s = {BODY_TIMEOUT_S}",
    ]
    for name in ("demo", *TEMPLATES):
        model = shutil.copytree(model_folder(), folder / name)
        if name in TEMPLATES:
            (model / "chat_template.jinja").write_text(TEMPLATES[name])
        lines += ["[[models]]", f'name = "{name}"', f"path = {json.dumps(str(model))}"]
        lines += [f"replicas = [{json.dumps(replica['address'])}]"]
    config = folder / "gateway.toml"
    config.write_text("\n".join(lines) + "\n")
    url = f"http://127.0.0.1:{port}"
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "scalellm", "gateway", "--config", str(config)],
            stderr=errors,
            env=own_environment(),
        )
    try:
        until(lambda: answers(url), START_S)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return call(url, "/ready").status == http.client.OK
    except ConnectionError:
        return False


def ask(url: str, model: str, **fields: object) -> Reply:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], **fields}
    return call(url, "/v1/chat/completions", body, headers={"Authorization": f"Bearer {KEY}"})


def test_keys(strict: str) -> None:
    asked: Any = {"model": "demo", "prompt": "Once", "max_tokens": 1}
    for key in ("sk-wrong", KEY + "x", KEY[:-1]):
        with (
            openai.OpenAI(base_url=strict + "/v1", api_key=key) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.completions.create(**asked)
    for headers in ({}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        reply = call(strict, "/v1/completions", asked, headers=headers)
        assert (reply.status, reply.error["type"]) == (401, "authentication_error")
        assert reply.headers["www-authenticate"] == "Bearer"
    with openai.OpenAI(base_url=strict + "/v1", api_key=KEY) as client:
        assert client.completions.create(**asked).choices
    assert call(strict, "/v1/models").status == http.client.UNAUTHORIZED
    assert call(strict, "/health").status == http.client.OK


def test_templates_that_fail_or_never_end(strict: str) -> None:
    for name in TEMPLATES:
        began_s = time.monotonic()
        reply = ask(strict, name)
        assert time.monotonic() - began_s < 10
        if name == "refusing":
            assert (reply.status, reply.error["param"]) == (http.client.BAD_REQUEST, "messages")
        else:
            assert reply.status == http.client.INTERNAL_SERVER_ERROR, (name, reply.body)
            assert reply.error["type"] == "server_error"
        assert "template" in reply.error["message"]
    assert "roles must alternate" in ask(strict, "refusing").error["message"]
    assert ask(strict, "demo", max_tokens=1).status == http.client.OK


def test_one_of_several_models_has_to_be_named(strict: str) -> None:
    asked = {"prompt": "Once", "max_tokens": 1}
    reply = call(strict, "/v1/completions", asked, headers={"Authorization": f"Bearer {KEY}"})
    assert (reply.status, reply.error["param"]) == (http.client.BAD_REQUEST, "model")
    assert all(f'"{name}"' in reply.error["message"] for name in ("demo", *TEMPLATES))


def test_a_body_of_100_mb_is_refused_unread(server: Serve) -> None:
    connection = connect(server.url)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(100_000_000))
    connection.endheaders()
    response = connection.getresponse()  # nothing of the body has been sent
    assert response.status == http.client.REQUEST_ENTITY_TOO_LARGE
    reply = Reply(response.status, response.headers, response.read())
    assert reply.error["code"] == "body_too_large"
    assert reply.headers["connection"] == "close"
    connection.close()


def test_a_client_that_sends_all_of_100_mb_reads_why_not(server: Serve) -> None:
    connection = connect(server.url)
    connection.request("POST", "/v1/completions", b" " * 100_000_000)
    response = connection.getresponse()
    assert response.status == http.client.REQUEST_ENTITY_TOO_LARGE
    reply = Reply(response.status, response.headers, response.read())
    assert reply.error["code"] == "body_too_large"
    connection.close()


def test_a_chunked_body_without_end_is_refused_at_the_limit(server: Serve) -> None:
    chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    sent_bytes = 0
    with raw_socket(server.url) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while sent_bytes < 512 << 20:
                client.sendall(chunk)
                sent_bytes += 1 << 20
        except ConnectionError:
            pass
    # What comes after the limit is thrown away for a while: a plain client reads the answer.
    assert 16 << 20 <= sent_bytes < 192 << 20


def test_a_client_that_stalls_in_its_body_or_its_headers(strict: str) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with raw_socket(strict) as client:
        client.sendall(head.encode() + b'Content-Length: 100\r\n\r\n{"model":')
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    with raw_socket(strict) as client:
        client.sendall(head.encode())
        began_s = time.monotonic()
        everything(client)
    assert time.monotonic() - began_s < 10


def test_clients_that_drip_are_closed_and_hold_up_nobody(strict: str) -> None:
    """Slow loris: every byte comes before any single wait ends, the whole never does."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    dripping = [raw_socket(strict) for _ in range(200)]
    for number, client in enumerate(dripping):
        length = b"Content-Length: 100000\r\n\r\n" if number % 2 else b"X-Slow: "
        client.sendall(head.encode() + length)
        client.setblocking(False)
    ends_s = time.monotonic() + 30
    while dripping:
        assert time.monotonic() < ends_s, f"{len(dripping)} are still open"
        assert ask(strict, "demo", max_tokens=1).status == http.client.OK
        for client in list(dripping):
            try:
                client.send(b"x")
                open_still = client.recv(65536) != b""
            except BlockingIOError:
                open_still = True
            except ConnectionError:
                open_still = False
            if not open_still:
                client.close()
                dripping.remove(client)


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while part := client.recv(65536):
        found += part
    return found


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # TLS to a plain port
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}    ",
    ],
    ids=["no HTTP", "TLS", "huge header", "negative length", "two lengths"],
)
def test_what_is_no_http_is_turned_away(server: Serve, raw: bytes) -> None:
    with raw_socket(server.url) as client:
        try:
            client.sendall(raw)
            answer = everything(client)
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_a_client_that_leaves_in_its_stream_ends_it(server: Serve) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "n": 4}
    connection = connect(server.url)
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
    assert connection.getresponse().readline().startswith(b"data: ")
    assert load(server.url)["in_flight_requests"] == 4
    connection.close()
    until(lambda: is_at_rest(server.url))


def test_a_client_that_leaves_before_its_answer_ends_it(server: Serve) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    connection = connect(server.url)
    connection.request("POST", "/v1/completions", json.dumps(body))
    until(lambda: load(server.url)["running_requests"] == 1)
    connection.close()
    until(lambda: is_at_rest(server.url))


def test_a_deadline_ends_the_request(server: Serve) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    reply = call(server.url, "/v1/completions", body | {"deadline_ms": 200})
    assert reply.status == http.client.GATEWAY_TIMEOUT
    assert reply.error["code"] == "deadline_exceeded"
    reply = call(server.url, "/v1/completions", body | {"deadline_ms": 500, "stream": True})
    assert reply.events()[-1]["error"]["code"] == "deadline_exceeded"


def test_requests_one_after_the_other_on_one_connection(server: Serve) -> None:
    connection = connect(server.url)
    for body, status in (
        ("{", 400),
        ('{"model": "demo", "prompt": "x", "max_tokens": 1}', 200),
    ) * 3:
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()
