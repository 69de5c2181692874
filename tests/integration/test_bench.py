"""The bench against an engine of set speed, through the real gateway."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import scalellm.demo
from scalellm.bench.plan import Level, Workload
from scalellm.bench.results import Result
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.target import TargetClient
from scalellm.errors import EndpointError

MODEL = Path(scalellm.demo.__file__).parent / "model"
TTFT_MS, TBT_MS = 50.0, 10.0
START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(function: str, *arguments: str) -> "subprocess.Popen[bytes]":
    code = f"import sys; from scalellm._core import {function}; {function}(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)


def wait_ready(url: str, *processes: "subprocess.Popen[bytes]") -> None:
    client, until = TargetClient(url), time.monotonic() + START_S
    while True:
        try:
            client.call("GET", "/ready")
            return
        except EndpointError as error:
            assert all(process.poll() is None for process in processes), "ended while starting"
            assert time.monotonic() < until, error
            time.sleep(0.05)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway before a fake engine that takes 50 ms to the first token, 10 ms a token then."""
    engine = f"unix:{tmp_path_factory.mktemp('bench') / 'engine.sock'}"
    vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    settings: dict[str, Any] = {
        "model": "demo",
        "model_path": str(MODEL),
        "vocab_size": vocab_size,
        "ttft_ms": TTFT_MS,
        "tbt_ms": TBT_MS,
        "output": {"kind": "echo"},
    }
    port = free_port()
    config = f'host = "127.0.0.1"\nport = {port}\n[[models]]\nname = "demo"\npath = "{MODEL}"\n'
    processes = [
        spawn("run_fake_engine", engine, json.dumps(settings)),
        spawn("run_gateway", config + f'replicas = ["{engine}"]\n'),
    ]
    try:
        found = f"http://127.0.0.1:{port}"
        wait_ready(found, *processes)
        yield found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bench(url: str, endpoint: str, *levels: Level) -> Result:
    workload = Workload(endpoint=endpoint, input_tokens=64, output_tokens=16)
    return run_bench(Options(url, levels, workload), Console(quiet=True))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_set_delays_come_back_in_closed_and_open_loop(url: str, endpoint: str) -> None:
    levels = (
        Level(concurrency=1, requests=4, warmup=1),
        Level(concurrency=32, requests=64, warmup=8),
        Level(rate=40.0, requests=40),
    )
    result = bench(url, endpoint, *levels)
    assert result.target["owned_by"] == "scalellm"
    assert result.failed == 0, [row["failures"] for row in result.rows]
    for row, level in zip(result.rows, levels, strict=True):
        assert row["completed"] == level.requests
        assert row["output_tokens"] == row["completed"] * 16
        assert row["input_tokens"] == row["completed"] * 64, result.workload
        assert row["token_sources"] == {"usage": row["completed"]}
        # Never less than was set; how much more is the machine's mood.
        assert TTFT_MS <= row["ttft_ms"]["p50"] < 100 * TTFT_MS
        assert row["e2e_ms"]["p50"] >= TTFT_MS + 15 * TBT_MS * 0.9
        assert 1.0 < row["tbt_ms"]["p50"] < 100 * TBT_MS


def test_a_wrong_model_is_refused_and_counted(url: str) -> None:
    options = Options(url, (Level(concurrency=2, requests=4),), Workload(), model="absent")
    row = run_bench(options, Console(quiet=True)).rows[0]
    assert row["failures"]["status"]["count"] == 4
    assert "absent" in row["failures"]["status"]["example"]
