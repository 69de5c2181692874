"""A deployment that changes its shape under streams, and what its clients notice: nothing."""

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from scalellm.cli.status import blueprint_lines
from scalellm.controller.blueprint.journal import replay
from scalellm.controller.gateway_view import get

from ..e2e.wire import call
from .served import START_S, Serve
from .supervised import children, command_line, kill, until

# One wide replica is the faster one up to six streams.
CALIBRATION = """
name = "test"
source = "derived"
note = "crosses at six streams"
switch_ms = 100.0
[[shapes]]
tp = 1
base_ms = 4.0
per_sequence_ms = 0.05
max_num_seqs = 64
max_num_batched_tokens = 512
step_budget_ms = 100
kv_tokens = 65536
[[shapes]]
tp = 2
base_ms = 1.0
per_sequence_ms = 0.5
max_num_seqs = 64
max_num_batched_tokens = 512
step_budget_ms = 100
kv_tokens = 65536
"""
STREAMS = 24
TOKENS = 200
SWITCH_S = 90.0


def stream(served: Serve, prompt: str) -> list[int]:
    """The ids of a streamed greedy answer; fails on anything but a whole one."""
    fields = {
        "prompt": prompt,
        "stream": True,
        "temperature": 0,
        "max_tokens": TOKENS,
        "return_token_ids": True,
    }
    ids: list[int] = []
    with served.post(fields) as answer:
        for line in answer:
            text = line.decode().strip().removeprefix("data: ")
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            assert "error" not in event, event
            ids += event["choices"][0].get("token_ids") or []
    assert len(ids) == TOKENS
    return ids


class Clients:
    """Streams over and over, each compared with the undisturbed answer."""

    def __init__(self, served: Serve, number: int, wanted: dict[str, list[int]]) -> None:
        self._served = served
        self._wanted = wanted
        self._ended = threading.Event()
        self.failures: list[str] = []
        self.answers = 0
        self._threads = [threading.Thread(target=self._run, args=(at,)) for at in range(number)]
        for thread in self._threads:
            thread.start()

    def _run(self, at: int) -> None:
        prompts = list(self._wanted)
        while not self._ended.is_set():
            prompt = prompts[at % len(prompts)]
            try:
                if stream(self._served, prompt) != self._wanted[prompt]:
                    self.failures.append(f"{prompt!r}: another answer")
            except (AssertionError, OSError, ValueError) as error:
                self.failures.append(f"{prompt!r}: {error!r}")
            self.answers += 1

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(SWITCH_S)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    calibration = tmp_path / "test.toml"
    calibration.write_text(CALIBRATION)
    found = Serve(
        tmp_path,
        *("--blueprint", "auto", "--devices", "2", "--calibration", str(calibration)),
        *("--objective", "throughput", "--min-stay-s", "1", "--hand-over-s", "0"),
        *("--kv-cache-memory", "64MiB"),
    )
    yield found
    found.close()


def state(served: Serve) -> dict[str, Any]:
    with urllib.request.urlopen(served.url + "/admin/v1/blueprint", timeout=10) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def is_steady(served: Serve, tp: int, count: int) -> bool:
    found = state(served)
    return found["phase"] == "steady" and found["blueprint"] == [{"tp": tp, "count": count}]


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.timeout(400)
def test_the_shape_follows_the_load_and_no_stream_notices(served: Serve, tmp_path: Path) -> None:
    assert is_steady(served, 1, 2)
    prompts = [f"Once upon a time there were {number} " for number in range(4)]
    wanted = {prompt: stream(served, prompt) for prompt in prompts}
    alone = Clients(served, 1, wanted)
    until(lambda: is_steady(served, 2, 1), SWITCH_S)
    crowd = Clients(served, STREAMS, wanted)
    until(lambda: is_steady(served, 1, 2), SWITCH_S)
    for clients in (alone, crowd):
        clients.end()
        assert clients.failures == []
        assert clients.answers > 0
    answer = get(served.url, "/admin/v1/blueprint")
    assert answer is not None
    assert blueprint_lines(answer)[0] == "blueprint 2 x TP 1 (auto), steady"
    (journal,) = (tmp_path / "state" / "scalellm" / "journals").iterdir()
    assert f"decisions about the shape are kept in {journal}" in served.errors()
    taken = list(replay(journal))
    switches = [str(decision.blueprint) for _, _, decision in taken if decision.switch]
    assert switches == ["1 x TP 2", "2 x TP 1"]
    assert all(told == decision.to_json() for _, told, decision in taken)


@pytest.mark.slow
@pytest.mark.needs("two-cores")
def test_static_shapes_serve_side_by_side(tmp_path: Path) -> None:
    arguments = ("--replica", "tp=2,count=1", "--replica", "tp=1,count=1", "--devices", "3")
    found = Serve(tmp_path, *arguments, "--kv-cache-memory", "64MiB", "--cpu-threads", "3")
    try:
        assert state(found)["blueprint"] == [{"tp": 2, "count": 1}, {"tp": 1, "count": 1}]
        assert state(found)["mode"] == "static"
        assert "replicas=2" in found.line
        answers = {tuple(stream(found, "Once upon a time")) for _ in range(4)}
        assert len(answers) == 1
    finally:
        found.close()


@pytest.mark.slow
def test_a_static_shape_tells_whom_it_has_given_up(tmp_path: Path) -> None:
    served = Serve(tmp_path, "--replicas", "2", "--cpu-threads", "1", "--kv-cache-memory", "16MiB")
    try:
        before = state(served)
        assert "given_up" not in before

        def is_given_up() -> bool:
            for pid in children(served.process.pid):
                if b"/engine-1.sock\0" in command_line(pid):
                    kill(pid)
            return "given_up" in state(served)

        until(is_given_up, START_S)
        reason = "ended 5 times in 120 s, the last time killed by SIGKILL"
        assert state(served) == before | {"given_up": {"engine-1": reason}}
        command = [sys.executable, "-m", "scalellm", "status", "--url", served.url]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert f"engine-1 given up: {reason}" in told.stdout.splitlines()
        assert f"scalellm: engine-1 given up: {reason}" in served.errors()
        assert served.works()
        wish = {"blueprint": [{"tp": 2, "count": 1}]}
        refused = call(served.url, "/admin/v1/blueprint", wish, method="PUT")
        assert refused.status == HTTPStatus.BAD_REQUEST
        assert "this deployment's is static" in refused.error["message"]
        assert state(served) == before | {"given_up": {"engine-1": reason}}
    finally:
        served.close()
