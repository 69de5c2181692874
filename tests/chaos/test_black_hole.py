"""Packets that vanish behind the gateway: noticed within the stated times."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalellm.controller.gateway_view import get, parse_metrics, replica_states

from ..e2e.wire import call, connect, load
from ..integration.gateways import MODEL, TBT_MS, Engine, Gateway
from ..integration.supervised import free_port, until
from .black_hole import BlackHole

# What a machine under load may add to a stated time.
PATIENCE_S = 10.0
TOKENS, STREAMS = 400, 6


@contextmanager
def gateway(folder: Path, models: str) -> Iterator[str]:
    made = Gateway(folder, f"replica_silence_s = 2.0\n{models}")
    try:
        yield made.url
    finally:
        made.close()


def events(url: str, body: dict[str, Any]) -> Iterator[Any]:
    """The events of a stream as they come; "[DONE]" stays text."""
    connection = connect(url)
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
    response = connection.getresponse()
    assert response.status == http.client.OK, response.read()
    while line := response.readline().strip():
        data = line.removeprefix(b"data: ")
        assert response.readline() == b"\n"
        yield data.decode() if data == b"[DONE]" else json.loads(data)
    connection.close()


def test_a_replica_behind_a_black_hole_is_left_within_its_silence(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    engines = [Engine(f"127.0.0.1:{port}", output={"kind": "noise"}) for port in ports]
    models = f'[[models]]\nname = "demo"\npath = {json.dumps(str(MODEL))}\nreplicas = '
    try:
        with BlackHole(("127.0.0.1", ports[0])) as hole:
            alone = models + f'["127.0.0.1:{hole.port}"]\n'
            both = models + f'["127.0.0.1:{hole.port}", "127.0.0.1:{ports[1]}"]\n'
            body = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": TOKENS, "seed": 7}
            body |= {"ignore_eos": True, "return_token_ids": True}
            with gateway(tmp_path, alone) as url:
                expected = [i for e in events(url, body) if e != "[DONE]" for i in ids(e)]
            assert len(expected) == TOKENS
            with gateway(tmp_path, both) as url:
                until(lambda: ready_replicas(url) == len(ports))
                streams = [events(url, body) for _ in range(STREAMS)]
                got = [ids(next(stream)) for stream in streams]
                hole.swallow()
                began_s = time.monotonic()
                for found, stream in zip(got, streams, strict=True):
                    for event in stream:
                        found += [] if event == "[DONE]" else ids(event)
                took_s = time.monotonic() - began_s - TOKENS * TBT_MS / 1e3
                assert all(found == expected for found in got)
                assert 0 < load(url)["replays_total"] <= STREAMS
                assert took_s < 2.0 + PATIENCE_S
    finally:
        for engine in engines:
            engine.close()


def ready_replicas(url: str) -> int:
    """A gateway is ready when one of its replicas is."""
    answer = get(url, "/metrics")
    assert answer is not None
    return list(replica_states(parse_metrics(answer.body)).values()).count("ready")


def ids(event: Any) -> list[int]:
    found: list[int] = event["choices"][0]["token_ids"]
    return found


def test_an_upstream_behind_a_black_hole_is_given_up_for_its_fallback(tmp_path: Path) -> None:
    """Before it greets by TLS, and before it answers."""
    engine = Engine(f"unix:{tmp_path}/engine.sock")
    model = f'[[models]]\nname = "demo"\npath = {json.dumps(str(MODEL))}\n'
    behind = Gateway(tmp_path, f'{model}replicas = ["unix:{tmp_path}/engine.sock"]\n')
    waits = "connect_timeout_s = 1.0\nfirst_byte_timeout_s = 1.0\nhealth_path = ''\n"
    try:
        for scheme, expected in (("https", 200), ("http", 504)):
            with BlackHole() as hole:
                hole.swallow()
                upstreams = f'[[models]]\nname = "far"\n[[models.upstreams]]\n{waits}'
                upstreams += f'url = "{scheme}://127.0.0.1:{hole.port}/v1"\n[[models.upstreams]]\n'
                upstreams += f'url = "{behind.url}/v1"\nmodel = "demo"\nfallback = true\n'
                with gateway(tmp_path, upstreams) as url:
                    body = {"model": "far", "prompt": "x", "max_tokens": 2}
                    began_s = time.monotonic()
                    reply = call(url, "/v1/completions", body)
                    assert time.monotonic() - began_s < 1.0 + PATIENCE_S
                    # Who has taken a request and is silent may compute it: nobody else is asked.
                    assert reply.status == expected, reply.body
                    assert hole.accepted == 1
    finally:
        behind.close()
        engine.close()
