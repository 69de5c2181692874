"""ScaleLLM's own front before an engine that does nothing: what a front costs on this machine."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalellm.bench.target import TargetClient
from scalellm.errors import EndpointError

_READY_WITHIN_S = 60.0
_ENDED_WITHIN_S = 10.0


@contextmanager
def front_alone(engine: Mapping[str, Any] | None = None) -> Generator[str, None, None]:
    """The URL of a gateway before a fake engine, with the demo model's tokenizer.

    `engine`: the fake engine's settings (crates/fake-engine, settings.rs); by default it answers
    at once. Raises EndpointError if they do not start.
    """
    import scalellm.demo

    model = Path(scalellm.demo.__file__).parent / "model"
    vocab_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    settings = {
        "model": "demo",
        "model_path": str(model),
        "vocab_size": vocab_size,
        "output": {"kind": "echo"},
        **(engine or {}),
    }
    with tempfile.TemporaryDirectory(prefix="scalellm-front-") as folder:
        address = f"unix:{folder}/engine.sock"
        port = _free_port()
        config = (
            f'port = {port}\nlog_level = "error"\n'
            f'[[models]]\nname = "demo"\npath = {json.dumps(str(model))}\n'
            f"replicas = [{json.dumps(address)}]\n"
        )
        processes = [
            _spawn("run_fake_engine", address, json.dumps(settings)),
            _spawn("run_gateway", config),
        ]
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(url, processes)
            yield url
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                _end(process)


def _spawn(function: str, *arguments: str) -> "subprocess.Popen[bytes]":
    code = f"import sys; from scalellm._core import {function}; {function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_ENDED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_ready(url: str, processes: "list[subprocess.Popen[bytes]]") -> None:
    client, until = TargetClient(url), time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            client.call("GET", "/ready")
            return
        except EndpointError as error:
            ended = any(process.poll() is not None for process in processes)
            if ended or time.monotonic() > until:
                raise EndpointError(f"the front alone did not start: {error}") from None
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
