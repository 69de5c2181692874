"""Engines in a Ray cluster of two nodes on this machine: deployed, served, a node lost, healed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalellm.controller.gateway_view import get, parse_metrics, replica_states

from .served import START_S, Serve, own_environment
from .supervised import command_line, descendants, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.needs("ray"), pytest.mark.timeout(300)]
LONG = 1500


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    yield found
    found.shutdown()


def engines_of(node: Any) -> list[int]:
    """Pids of the engines on a node."""
    (raylet,) = node.all_processes["raylet"]
    return [p for p in descendants(raylet.process.pid) if b"\0engine\0" in command_line(p)]


def ready(served: Serve) -> int:
    answer = get(served.url, "/metrics")
    states = replica_states(parse_metrics(answer.body)) if answer else {}
    return sum(state == "ready" for state in states.values())


def test_a_lost_nodes_engine_is_started_on_another(cluster: Any, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    served = Serve(
        tmp_path,
        *("--launcher", "ray", "--ray-address", cluster.address, "--replicas", "2"),
        *("--cpu-threads", "1", "--kv-cache-memory", "16MiB"),
    )
    try:
        assert [len(engines_of(node)) for node in nodes] == [1, 1]
        with served.post({"stream": True, "max_tokens": LONG}) as stream:
            assert stream.readline().startswith(b"data: ")
            cluster.remove_node(nodes[0], allow_graceful=False)
            rest = stream.read().decode()
        events = [line.removeprefix("data: ") for line in rest.splitlines() if line]
        assert events.pop() == "[DONE]"
        assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
        assert served.works()
        until(lambda: len(engines_of(nodes[1])) == 2, START_S)
        until(lambda: ready(served) == 2, START_S)
    finally:
        served.close()
    until(lambda: engines_of(nodes[1]) == [], START_S)


def test_ranks_are_in_one_node_and_a_drain_ends_them(cluster: Any, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=count) for count in (1, 2, 1)]
    served = Serve(
        tmp_path,
        *("--launcher", "ray", "--ray-address", cluster.address, "--tensor-parallel-size", "2"),
        *("--cpu-threads", "2", "--kv-cache-memory", "16MiB"),
    )
    try:
        assert [len(engines_of(node)) for node in nodes] == [0, 1, 0]
        with served.post({"stream": True, "max_tokens": 300}) as stream:
            assert stream.readline().startswith(b"data: ")
            served.process.terminate()
            assert stream.read().decode().rstrip().endswith("data: [DONE]")
        assert served.process.wait(START_S) == 0, served.errors()
        until(lambda: engines_of(nodes[1]) == [], START_S)
    finally:
        served.close()


@pytest.mark.parametrize(
    ("address", "more", "said"),
    [
        ("127.0.0.1:1", (), "no Ray cluster at 127.0.0.1:1"),
        ("127.0.0.1:none", (), "'none' is no port"),
        (None, ("--cpu-threads", "3"), "needs 3 CPUs and 0 GPUs in one node"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    cluster: Any, tmp_path: Path, address: str | None, more: tuple[str, ...], said: str
) -> None:
    cluster.add_node(num_cpus=2)
    given = ("--launcher", "ray", "--ray-address", address or cluster.address, *more)
    done = subprocess.run(
        [sys.executable, "-m", "scalellm", "serve", "demo", "--port", "0", *given],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
        env=own_environment() | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert done.returncode in (1, 2)
    assert said in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
