"""What each launcher makes of a plan, without starting anything."""

import json
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
from scalellm.controller.launchers.kubernetes import helm_values
from scalellm.errors import ConfigError


def config(engine: dict[str, Any] | None = None, **groups: Any) -> ServeConfig:
    return ServeConfig(
        EngineConfig(**(engine or {})),
        groups.get("gateway", GatewayConfig()),
        groups.get("deployment", DeploymentConfig()),
        LogConfig(),
        groups.get("blueprint", BlueprintConfig()),
    )


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


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"deployment": DeploymentConfig(blueprint="auto")}, "replicas of one shape"),
        ({"blueprint": BlueprintConfig(replica=("tp=1",))}, "replicas of one shape"),
        ({"gateway": GatewayConfig(replay=False)}, "replay: the chart has no value for it"),
    ],
)
def test_what_the_chart_does_not_have_is_refused(groups: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        helm_values([config(**groups)])
