"""Whether two shapes of a model have memory beside each other."""

from collections.abc import Sequence

from scalellm.cli.memory import settled_switches
from scalellm.config import (
    BlueprintConfig,
    DeploymentConfig,
    EngineConfig,
    GatewayConfig,
    LogConfig,
    ServeConfig,
)
from scalellm.controller.shapes import Place

MIB = 1 << 20
PLACE = Place((1, 2), cores=2)


def auto(switch: str = "auto", kv: int | None = MIB) -> ServeConfig:
    return ServeConfig(
        EngineConfig(model="m", served_model_name="m", device="cpu", kv_cache_memory_bytes=kv),
        GatewayConfig(),
        DeploymentConfig(blueprint="auto"),
        LogConfig(),
        BlueprintConfig(switch=switch),
    )


def switches(configs: Sequence[ServeConfig], available_bytes: int) -> list[str]:
    planned = settled_switches([(found, PLACE) for found in configs], available_bytes)
    return [found.blueprint.switch for found, _ in planned]


def test_a_shape_comes_after_the_other_where_memory_is_not_enough_for_both() -> None:
    assert switches([auto()], 3 * MIB) == ["beside"]  # one wide, two narrow
    assert switches([auto()], 3 * MIB - 1) == ["after"]
    assert switches([auto(kv=None)], 0) == ["beside"]  # each engine takes what is left
    assert switches([auto(), auto("beside")], 5 * MIB) == [
        "after",
        "beside",
    ]
