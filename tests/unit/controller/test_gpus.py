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
from scalellm.controller.gpus import Gpus, count_gpus, settled, torch_gpus
from scalellm.controller.launchers.local import LocalLauncher
from scalellm.controller.shapes import check_together
from scalellm.controller.sharing import share
from scalellm.errors import ConfigError


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """A /dev of a machine with an NVIDIA GPU."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    return tmp_path / "dev"


def never() -> int:
    raise AssertionError("nobody needs to know")


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
        Served(settled(named(config, f"m{at}"), gpus), folder / "model")
        for at, config in enumerate(configs)
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


def test_torch_is_asked_what_the_engines_will_find(devices: Path) -> None:
    two, one = config(2), config(1)
    assert count_gpus([two], lambda: 3, devices) == 3
    assert count_gpus([one, named(one, "b")], lambda: 1, devices) == 1
    assert count_gpus([config(2, device="cuda")], lambda: 2, devices / "none") == 2
    # A driver without a torch that can use it: what says `auto` runs on the CPU.
    assert settled(two, count_gpus([two], lambda: 0, devices)).engine.device == "auto"
    assert settled(two, 3).engine.device == "cuda"
    for replicas, where in ((2, devices), (1, devices / "none")):
        with pytest.raises(ConfigError, match="--device: got cuda, and torch sees no GPU here"):
            count_gpus([config(replicas, device="cuda")], lambda: 0, where)


def test_torch_is_not_asked_where_it_makes_no_difference(devices: Path) -> None:
    for single in (config(1), config(1, device="cuda")):
        assert count_gpus([single], never, devices) == 0
    assert count_gpus([config(2, device="cpu")], never, devices) == 0
    assert count_gpus([config(2)], never, devices / "none") == 0


def test_torch_answers_as_an_engine_would() -> None:
    import torch

    assert torch_gpus() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


# ------------------------------------------------------------ a shape that changes


def auto(
    gpus: int, name: str = "m", shape: dict[str, Any] | None = None, **engine: Any
) -> ServeConfig:
    """As `serve` has it, on a machine with so many GPUs."""
    found = config(1, BlueprintConfig(**{"calibration": "node-8gpu", **(shape or {})}), **engine)
    deployment = DeploymentConfig(blueprint="auto")
    return settled(named(replace(found, deployment=deployment), name), gpus)


def test_both_shapes_lie_on_the_same_gpus_and_share_their_memory(tmp_path: Path) -> None:
    served = Served(auto(8), tmp_path)
    plan = plan_deployment([served], 8123, tmp_path, LocalLauncher(tmp_path, 8))
    found = {name: list(command.arguments) for name, (_, command) in plan.engines.items()}
    firsts = {name: of[of.index("--first-device") + 1] for name, of in found.items()}
    assert firsts == {f"engine-tp1-{at}": str(at) for at in range(8)} | {"engine-tp8-0": "0"}
    for flags in found.values():
        assert flags[flags.index("--gpu-memory-utilization") + 1] == "0.45"
        assert flags[flags.index("--device") + 1] == "cuda"
    assert plan.wanted == {"engine-tp8-0"}
    (steering,) = plan.steering
    assert 'source = "derived"' in steering["calibration"]


def test_a_part_of_the_gpus_can_be_had(tmp_path: Path) -> None:
    file = tmp_path / "costs.toml"
    shapes = "".join(
        f"[[shapes]]\ntp = {tp}\nbase_ms = 1.0\nmax_num_seqs = 8\nmax_num_batched_tokens = 512\n"
        "step_budget_ms = 100\nkv_tokens = 4096\n"
        for tp in (1, 2, 4)
    )
    file.write_text(f'name = "c"\nsource = "measured"\nnote = ""\n{shapes}')
    asked = {"calibration": str(file), "devices": 4}
    assert first_devices(tmp_path, 8, auto(8, shape=asked)) == [0, 1, 2, 3, 0, 2, 0]


@pytest.mark.parametrize(
    ("gpus", "shape", "engine", "said"),
    [
        (8, {}, {"gpu_memory_utilization": 0.6}, "--gpu-memory-utilization: got 0.6, allowed with"),
        (4, {"devices": 8}, {}, "--devices: got 8, allowed: at most 4, one for each GPU"),
        (4, {}, {}, "node-8gpu has widths 1, 8, the model allows 1, 2, 4, 8, and there are 4"),
        (1, {}, {}, "auto needs two shapes to choose from"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, gpus: int, shape: dict[str, Any], engine: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        served = Served(auto(gpus, shape=shape, **engine), tmp_path)
        plan_deployment([served], 8123, tmp_path, LocalLauncher(tmp_path, gpus))


def test_half_of_the_memory_each_is_all_of_it() -> None:
    assert auto(8, gpu_memory_utilization=0.5).engine.memory_share == 0.5
    assert auto(8, shape={"switch": "after"}).engine.memory_share == 0.9
    assert auto(0).engine.memory_share == 0.9  # on a CPU nobody asks for it


def test_ray_gives_no_gpu_to_two_at_once() -> None:
    found = auto(8)
    on_ray = replace(found, deployment=replace(found.deployment, launcher="ray"))
    with pytest.raises(ConfigError, match="--launcher: got ray, allowed with --blueprint auto on"):
        check_together(on_ray)


def test_ray_frees_no_place_before_the_next_shape_starts() -> None:
    found = auto(0, shape={"switch": "after"})
    on_ray = replace(found, deployment=replace(found.deployment, launcher="ray"))
    with pytest.raises(ConfigError, match="--switch: got after, allowed with --launcher ray: auto"):
        check_together(on_ray)


def test_a_model_beside_one_that_changes_has_gpus_of_its_own(tmp_path: Path) -> None:
    still = settled(named(config(1, tensor_parallel_size=2), "still"), 16)
    configs = [still, auto(16, "b", {"devices": 8}), auto(16, "c")]
    shared = share(configs, cores=4, devices=None, gpus=16)
    assert [config.blueprint.devices for config, _ in shared] == [4, 8, 4]
    with pytest.raises(ConfigError, match="model 'm2': --blueprint: auto needs two shapes"):
        first_devices_of(tmp_path, shared)
    configs = [still, auto(16, "b", {"devices": 8})]
    shared = share(configs, cores=4, devices=None, gpus=16)
    assert first_devices_of(tmp_path, shared) == [0, *range(8, 16), 8]


def first_devices_of(folder: Path, shared: list[tuple[ServeConfig, int]]) -> list[int]:
    return first_devices(folder, 16, *(config for config, _ in shared))


@pytest.mark.parametrize(
    ("beside", "devices", "said"),
    [
        (
            {"device": "cpu"},
            None,
            "device: got cpu for 'a', allowed beside --blueprint auto on GPUs",
        ),
        ({}, 16, "--devices: got 16, allowed: at most 8, one for each GPU"),
        ({"tensor_parallel_size": 8}, None, "what would fit: devices of 'a' 4, 'b' 4$"),
    ],
)
def test_models_that_cannot_share_the_gpus_are_refused(
    beside: dict[str, Any], devices: int | None, said: str
) -> None:
    configs = [settled(named(config(1, **beside), "a"), 8), auto(8, "b")]
    with pytest.raises(ConfigError, match=said):
        share(configs, 4, devices, 8)


def test_gpus_count_as_devices_where_there_are_more_than_cores() -> None:
    configs = [settled(named(config(1, tensor_parallel_size=4), name), 8) for name in "ab"]
    assert len(share(configs, cores=2, devices=None, gpus=8)) == 2
