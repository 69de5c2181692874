"""An engine that comes back with other weights at the same address: it is not to go on."""

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..e2e.wire import call, complete, connect
from ..integration.served import START_S, own_environment
from ..integration.supervised import free_port, until

DEMO = Path(__file__).parents[2] / "python/scalellm/demo/model"


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One `scalellm` process, killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scalellm", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=own_environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(START_S)


def is_ready(url: str) -> bool:
    try:
        return call(url, "/ready").status == http.client.OK
    except OSError:
        return False


def test_a_stream_never_goes_on_with_other_weights(tmp_path: Path) -> None:
    engine = ("engine", str(DEMO), "--listen", f"unix:{tmp_path}/engine.sock")
    memory = ("--kv-cache-memory", "64MiB", "--served-model-name", "demo")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'port = {port}\n[[models]]\nname = "demo"\npath = "{DEMO}"\n'
        f'replicas = ["unix:{tmp_path}/engine.sock"]\n'
    )
    with running("gateway", "--config", str(config)):
        with running(*engine, *memory) as first:
            until(lambda: is_ready(url), START_S)
            connection = connect(url)
            body = {"model": "demo", "prompt": "Once", "stream": True, "max_tokens": 2000}
            connection.request(
                "POST", "/v1/completions", json.dumps(body | {"ignore_eos": True, "seed": 1})
            )
            response = connection.getresponse()
            assert response.readline().startswith(b"data: {")
            os.kill(first.pid, 9)
            first.wait(START_S)
        with running(*engine, *memory, "--load-format", "dummy"):
            *_, last = response.read().decode().strip().split("\n\n")
            connection.close()
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == "engine_lost"
            assert "other weights" in error["message"]
            # What begins now is the new engine's alone.
            assert complete(url, max_tokens=4).status == http.client.OK
