"""A gateway that knows its engines by name, as in a cluster: they come, go, come back elsewhere."""

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalellm.controller.gateway_view import get, parse_metrics, replica_states
from scalellm.demo import model_folder

from .served import own_environment
from .supervised import until

ENGINE = "import sys; from scalellm._core import run_fake_engine as run; run(*sys.argv[1:])"
SETTINGS = {"vocab_size": 2048, "max_model_len": 4096, "ttft_ms": 1.0, "tbt_ms": 1.0}
NAME = "llm-scalellm-demo-{0}.llm-scalellm-demo.serving.svc.cluster.local"


class Cluster:
    """Pods on loopback addresses of their own, and a gateway that knows three names."""

    def __init__(self, folder: Path) -> None:
        self.names = folder / "names"
        self.names.write_text("")
        self.pods: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
            self.port = int(probe.getsockname()[1])
        library, config, self._log = folder / "names.so", folder / "gateway.toml", folder / "log"
        source = Path(__file__).with_name("names.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        replicas = [f"{NAME.format(at)}:{self.port}" for at in range(3)]
        config.write_text(
            f'port = 0\n[[models]]\nname = "demo"\npath = {json.dumps(str(model_folder()))}\n'
            f"replicas = {json.dumps(replicas)}\n"
        )
        with self._log.open("wb") as log:
            self._gateway = subprocess.Popen(
                [sys.executable, "-m", "scalellm", "gateway", "--config", str(config)],
                stderr=log,
                env=own_environment() | {"LD_PRELOAD": str(library), "NAMES": str(self.names)},
            )
        until(lambda: re.search(r"127\.0\.0\.1:\d+", self._log.read_text()))
        found = re.search(r"127\.0\.0\.1:\d+", self._log.read_text())
        assert found is not None
        self.url = f"http://{found[0]}"

    def start(self, number: int, address: str) -> None:
        command = [sys.executable, "-c", ENGINE, f"{address}:{self.port}", json.dumps(SETTINGS)]
        self.pods[number] = (address, subprocess.Popen(command, env=own_environment()))
        self._tell()

    def lose(self, number: int) -> None:
        _, process = self.pods.pop(number)
        process.kill()
        process.wait()
        self._tell()

    def _tell(self) -> None:
        lines = [f"{NAME.format(at)} {address}\n" for at, (address, _) in self.pods.items()]
        part = self.names.with_suffix(".part")
        part.write_text("".join(lines))
        part.replace(self.names)

    def ready(self) -> list[int]:
        """Numbers of the engines that the gateway would send to."""
        answer = get(self.url, "/metrics")
        states = replica_states(parse_metrics(answer.body)) if answer else {}
        return [at for at in range(3) if states.get(f"{NAME.format(at)}:{self.port}") == "ready"]

    def answers(self) -> bool:
        body = {"model": "demo", "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return bool(json.loads(response.read())["usage"]["completion_tokens"] == 4)

    def close(self) -> None:
        for process in (self._gateway, *(process for _, process in self.pods.values())):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    yield found
    found.close()


@pytest.mark.needs("cc")
def test_engines_are_found_by_name_wherever_they_are_now(cluster: Cluster) -> None:
    assert cluster.ready() == []
    cluster.start(0, "127.0.0.2")
    until(lambda: cluster.ready() == [0])
    cluster.start(1, "127.0.0.3")  # autoscaling adds one
    until(lambda: cluster.ready() == [0, 1])
    assert cluster.answers()
    cluster.lose(0)
    until(lambda: cluster.ready() == [1])
    assert cluster.answers()
    cluster.start(0, "127.0.0.4")  # its pod is started again, on another node
    until(lambda: cluster.ready() == [0, 1])
    cluster.lose(1)
    until(lambda: cluster.ready() == [0])
    assert cluster.answers()
