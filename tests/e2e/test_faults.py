"""An engine that dies or stops in the middle of its streams, and what its clients see of it where
replays are off. With replays: tests/chaos."""

import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ..integration.served import START_S, Serve
from ..integration.supervised import kill, until
from .wire import chat, complete, connect, is_at_rest, load

STREAMS = 8
HUNG_AFTER_S = 2
# From the fault to the streams' end: what the link waits before it calls an engine hung, and a
# slow machine's share.
NOTICED_WITHIN_S = {signal.SIGKILL: 5.0, signal.SIGSTOP: 15.0}


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    made = Serve(
        tmp_path_factory.mktemp("serve"),
        *("--kv-cache-memory", "64MiB", "--hung-after-s", str(HUNG_AFTER_S), "--no-replay"),
    )
    yield made
    made.close()


class Stream:
    """A long stream that has begun."""

    def __init__(self, url: str, prompt: str) -> None:
        self._connection = connect(url)
        body = {"model": "demo", "prompt": prompt, "stream": True, "max_tokens": 2000}
        self._connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}))
        self._response = self._connection.getresponse()
        assert self._response.status == http.client.OK
        self.events: list[Any] = [self._next()]

    def _next(self) -> Any:
        while line := self._response.readline().strip():
            data = line.removeprefix(b"data: ")
            assert self._response.readline() == b"\n"
            return data.decode() if data == b"[DONE]" else json.loads(data)
        return None

    def rest(self) -> list[Any]:
        """All events to the end of the stream."""
        while (event := self._next()) is not None:
            self.events.append(event)
        self._connection.close()
        return self.events


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda found: found.name)
def test_streams_of_a_lost_engine_end_with_an_error_and_the_next_engine_works(
    fragile: Serve, fault: signal.Signals
) -> None:
    engine = fragile.engine_pid()
    streams = [Stream(fragile.url, f"Once {index}") for index in range(STREAMS)]
    os.kill(engine, fault)
    failed_s = time.monotonic()
    for stream in streams:
        *told, last = stream.rest()
        assert all("choices" in event for event in told)
        assert last["error"]["code"] == "engine_lost"
        assert last["error"]["type"] == "server_error"
        assert last["error"]["message"]
    assert time.monotonic() - failed_s < NOTICED_WITHIN_S[fault]
    until(fragile.works, START_S)
    assert fragile.engine_pid() not in (0, engine)
    until(lambda: is_at_rest(fragile.url))
    reply = chat(
        fragile.url,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert reply.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_without_an_engine_requests_are_refused_at_once(fragile: Serve) -> None:
    kill(fragile.engine_pid())
    until(lambda: complete(fragile.url).status != http.client.OK)
    began_s = time.monotonic()
    reply = complete(fragile.url)
    assert time.monotonic() - began_s < 5
    assert reply.status == http.client.SERVICE_UNAVAILABLE
    assert reply.error["code"] == "no_replica"
    assert int(reply.headers["retry-after"]) > 0
    assert load(fragile.url)["requests_in_flight"] == 1  # this one
    until(fragile.works, START_S)


def ended_with(fragile: Serve, text: str) -> Callable[[], bool]:
    return lambda: text in fragile.errors()


def test_the_log_says_what_happened(fragile: Serve) -> None:
    until(ended_with(fragile, "engine-0 ended: "))
    assert "killing engine-0: no sign of life" in fragile.errors()
    assert "Traceback" not in fragile.errors()
