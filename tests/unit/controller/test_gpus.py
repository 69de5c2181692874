"""GPUs of a host: how many there are, and which replica has which. The devices here are faked."""

from dataclasses import replace
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
from scalellm.controller.gpus import Gpus, visible_gpus
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.errors import ConfigError


@pytest.mark.parametrize(
    ("listed", "seen"),
    [(None, 3), ("", 0), ("-1", 0), ("2,0", 2), ("0,7,1", 1), ("GPU-a,GPU-b", 2)],
)
def test_gpus_are_counted_by_their_devices_and_what_may_be_seen(
    tmp_path: Path, listed: str | None, seen: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_gpus(tmp_path, environment) == seen
    assert visible_gpus(tmp_path / "none", {}) == 0


def config(
    replicas: int = 1, blueprint: BlueprintConfig | None = None, **engine: Any
) -> ServeConfig:
    return ServeConfig(
        EngineConfig(**engine),
        GatewayConfig(),
        DeploymentConfig(replicas=replicas),
        LogConfig(),
        blueprint or BlueprintConfig(),
    )


def first_devices(folder: Path, gpus: int, *configs: ServeConfig) -> list[int]:
    """Of each engine's command, in their order."""
    models = [
        Served(named(config, f"m{at}"), folder / "model") for at, config in enumerate(configs)
    ]
    plan = plan_deployment(models, 8123, folder, LocalLauncher(folder, gpus))
    found = []
    for _, command in plan.engines.values():
        flags = list(command.arguments)
        found.append(int(flags[flags.index("--first-device") + 1]))
    return found


def named(config: ServeConfig, name: str) -> ServeConfig:
    return replace(config, engine=replace(config.engine, served_model_name=name))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_replica_has_gpus_of_its_own(tmp_path: Path, device: str) -> None:
    assert first_devices(tmp_path, 4, config(2, device=device)) == [0, 1]
    two_each = config(2, device=device, tensor_parallel_size=2)
    assert first_devices(tmp_path, 4, two_each) == [0, 2]
    of_two_models = [config(2, device=device), config(1, device=device, tensor_parallel_size=2)]
    assert first_devices(tmp_path, 4, *of_two_models) == [0, 1, 2]


def test_replicas_of_several_shapes(tmp_path: Path) -> None:
    shapes = BlueprintConfig(replica=("tp=2,count=1", "tp=1,count=2"), devices=4)
    assert first_devices(tmp_path, 4, config(blueprint=shapes, device="cuda")) == [0, 2, 3]


def test_on_a_cpu_nobody_has_any(tmp_path: Path) -> None:
    assert first_devices(tmp_path, 4, config(3, device="cpu")) == [0, 0, 0]
    assert first_devices(tmp_path, 0, config(3, device="auto")) == [0, 0, 0]
    beside = [config(1, device="cuda"), config(1, device="cpu"), config(1, device="cuda")]
    assert first_devices(tmp_path, 2, *beside) == [0, 0, 1]


def test_where_gpus_cannot_be_counted_every_replica_has_others(tmp_path: Path) -> None:
    assert first_devices(tmp_path, 0, config(3, device="cuda")) == [0, 1, 2]


def test_a_gpu_is_shared_once_none_is_left_and_its_memory_allows_it(tmp_path: Path) -> None:
    little = config(3, device="cuda", gpu_memory_utilization=0.45)
    assert first_devices(tmp_path, 2, little) == [0, 1, 0]
    with pytest.raises(ConfigError, match=r"none of the 2 GPUs is left for engine-2.*not 1\.8"):
        plan = Served(config(3, device="cuda"), tmp_path)
        plan_deployment([plan], 8123, tmp_path, LocalLauncher(tmp_path, 2))


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="engine-0 needs 4 GPUs, one for each rank; there are 2"):
        Gpus(2).take("engine-0", 4, 0.9)


def test_a_plan_that_changes_its_shape_has_no_gpus(tmp_path: Path) -> None:
    deployment = DeploymentConfig(blueprint="auto")
    for device, gpus in (("auto", 2), ("cuda", 0)):
        asked = ServeConfig(
            EngineConfig(device=device, cpu_threads=4),
            GatewayConfig(),
            deployment,
            LogConfig(),
            BlueprintConfig(devices=2),
        )
        with pytest.raises(ConfigError, match="allowed with --blueprint auto: cpu"):
            launcher = LocalLauncher(tmp_path, gpus)
            plan_deployment([Served(asked, tmp_path, 4)], 8123, tmp_path, launcher)
