"""What each launcher makes of a plan, without starting anything."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
)
from scalellm.controller.deployment import Served, plan_deployment
from scalellm.controller.launchers import ray
from scalellm.controller.launchers.kubernetes import helm_values
from scalellm.controller.launchers.ray import Node, RayLauncher, find_nodes
from scalellm.errors import ConfigError, ServeError

NODES = [Node("head", 1, 0), Node("a", 4, 0), Node("b", 8, 2)]


def config(engine: dict[str, Any] | None = None, **groups: Any) -> ServeConfig:
    return ServeConfig(
        EngineConfig(**(engine or {})),
        groups.get("gateway", GatewayConfig()),
        groups.get("deployment", DeploymentConfig()),
        LogConfig(),
        groups.get("blueprint", BlueprintConfig()),
    )


def test_ray_gets_the_engine_and_the_gateway_a_file_to_look_for_it(tmp_path: Path) -> None:
    launcher = RayLauncher(tmp_path, "head:6379", NODES)
    model = Served(config({"model": "org/m"}), tmp_path / "downloaded", launcher.cores)
    plan = plan_deployment([model], 8123, tmp_path, launcher)
    address, command = plan.engines["engine-0"]
    assert address == f"file:{tmp_path}/engine-0.address"
    given = json.loads(command.arguments[-1])
    assert given["ray_address"] == "head:6379"
    engine = given["engine"]
    # a hub id is every node's to find; one engine has at most the CPUs of the largest node
    assert (engine["model"], engine["threads"], engine["ranks"]) == ("org/m", 8, 1)
    assert "--listen" not in engine["flags"]
    folder = tmp_path / "folder"
    folder.mkdir()
    assert launcher.model(str(folder), folder) == str(folder)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"cpu_threads": 9}, "needs 9 CPUs and 0 GPUs in one node"),
        ({"device": "cuda", "tensor_parallel_size": 4}, "the largest, b: 8 CPUs and 2 GPUs"),
    ],
)
def test_what_no_node_has_is_refused_with_what_the_largest_has(
    tmp_path: Path, engine: dict[str, Any], said: str
) -> None:
    launcher = RayLauncher(tmp_path, "auto", NODES)
    with pytest.raises(ConfigError) as caught:
        plan_deployment([Served(config(engine), tmp_path)], 8123, tmp_path, launcher)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ("{'missing': 'ray'}", ConfigError, "pip install scalellm"),
        ("{'error': 'refused'}", ServeError, "no Ray cluster at x:1: refused"),
        ("3", ServeError, "asking x:1 failed"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, answer: str, error: type[Exception], said: str
) -> None:
    code = f"import json; print('noise'); print(json.dumps({answer}) if {answer} != 3 else 'x')"
    monkeypatch.setattr(ray, "PYTHON", (sys.executable, "-c", code))
    with pytest.raises(error, match=said):
        find_nodes("x:1")


def test_kubernetes_gets_values_with_what_was_asked() -> None:
    small = config(
        {
            "model": "org/Small",
            "served_model_name": "small",
            "quantization": "int4",
            "enable_prefix_caching": False,
            "tensor_parallel_size": 2,
            "max_model_len": 512,
        },
        deployment=DeploymentConfig(replicas=3, drain_timeout_s=12.4),
        gateway=GatewayConfig(max_queued=7, api_key=("hush",), routing="least-load"),
    )
    found = helm_values([small, config()])
    first, second = found["models"]
    assert first == {
        "name": "small",
        "model": "org/Small",
        "replicas": 3,
        "tensorParallelSize": 2,
        "routing": "least-load",
        "args": ["--quantization", "int4", "--no-enable-prefix-caching"],
        "cpuThreads": 2,
        "resources": {"requests": {"cpu": "2"}},
        "maxModelLen": 512,
    }
    assert second["args"] == []
    assert found["gateway"] == {"config": {"max_queued": 7}, "drainTimeoutSeconds": 12}
    assert "hush" not in json.dumps(found)


def test_kubernetes_gets_whole_deployments_where_shapes_were_asked_for() -> None:
    auto = DeploymentConfig(blueprint="auto")
    slo = BlueprintConfig(devices=4, objective="slo", journal="none", calibration="node-8gpu")
    mixed = BlueprintConfig(devices=4, replica=("tp=1", "tp=2", "tp=1"))
    first, second = helm_values([config(deployment=auto, blueprint=slo), config(blueprint=mixed)])[
        "models"
    ]
    assert (first["blueprint"], first["devices"], first["cpuThreads"]) == ("auto", 4, 4)
    assert first["args"] == [
        *("--objective", "slo", "--journal", "none", "--calibration", "node-8gpu"),
    ]
    assert second["shapes"] == ["tp=2,count=1", "tp=1,count=2"]
    assert "blueprint" not in second


def test_kubernetes_gets_a_gpu_for_each_device() -> None:
    auto = config({"device": "cuda"}, deployment=DeploymentConfig(blueprint="auto"),
                  blueprint=BlueprintConfig(devices=8))  # fmt: skip
    spread = config({"device": "cuda", "tensor_parallel_size": 4, "nnodes": 2})
    models = helm_values([auto, spread, config()])["models"]
    limits = [model["resources"].get("limits") for model in models]
    assert limits == [{"nvidia.com/gpu": "8"}, {"nvidia.com/gpu": "2"}, None]
    assert models[0]["args"] == ["--device", "cuda"]


def test_kubernetes_gets_the_hosts_of_a_replica() -> None:
    spread = config({"tensor_parallel_size": 4, "nnodes": 2, "master_addr": "10.0.0.1"})
    (found,) = helm_values([spread])["models"]
    assert (found["hosts"], found["tensorParallelSize"], found["args"]) == (2, 4, [])
    (wide,) = helm_values([config({"tensor_parallel_size": 8, "nnodes": 2})])["models"]
    assert wide["cpuThreads"] == 4, "of one pod"
    with pytest.raises(ConfigError, match="nnodes: got 3"):
        helm_values([config({"tensor_parallel_size": 4, "nnodes": 3})])


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"deployment": DeploymentConfig(blueprint="auto")}, "devices: missing"),
        ({"blueprint": BlueprintConfig(replica=("tp=4",), devices=2)}, "needs 4 devices"),
        (
            {
                "deployment": DeploymentConfig(blueprint="auto"),
                "blueprint": BlueprintConfig(devices=2, calibration="mine.toml"),
            },
            "calibration: a file of this machine",
        ),
        (
            {
                "deployment": DeploymentConfig(blueprint="auto"),
                "blueprint": BlueprintConfig(devices=2, journal="mine.jsonl"),
            },
            "journal: a file of this machine",
        ),
        ({"gateway": GatewayConfig(replay=False)}, "replay: the chart has no value for it"),
    ],
)
def test_what_the_chart_does_not_have_is_refused(groups: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        helm_values([config(**groups)])
