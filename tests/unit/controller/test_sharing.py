"""Devices divided among models: what each gets, and what is refused."""

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
from scalellm.controller.sharing import Wish, divide, share
from scalellm.errors import ConfigError


def config(name: str, tp: int = 1, replicas: int = 1, **shape: Any) -> ServeConfig:
    auto = "auto" if shape.pop("auto", False) else "static"
    return ServeConfig(
        EngineConfig(served_model_name=name, tensor_parallel_size=tp),
        GatewayConfig(),
        DeploymentConfig(replicas=replicas, blueprint=auto),
        LogConfig(),
        BlueprintConfig(**shape),
    )


@pytest.mark.parametrize(
    ("asked", "needed"),
    [
        (config("m"), 1),
        (config("m", tp=2, replicas=3), 6),
        (config("m", replica=("tp=2,count=2", "tp=1")), 5),
        (config("m", auto=True), 2),
        (config("m", devices=4), 4),
    ],
)
def test_a_plan_needs_its_replicas_devices(asked: ServeConfig, needed: int) -> None:
    assert Wish.of(asked).needed == needed


def test_what_is_left_is_divided_equally_among_those_without_an_assignment() -> None:
    wishes = [Wish("a", 1, None), Wish("b", 2, 2), Wish("c", 2, None)]
    assert divide(wishes, 5) == (1, 2, 2)
    assert divide(wishes, 8) == (3, 2, 3)


@pytest.mark.parametrize(
    ("wishes", "devices", "said"),
    [
        (
            [Wish("a", 2, None), Wish("b", 1, 3)],
            4,
            "5 devices, and there are 4; what would fit: devices of 'a' 2, 'b' 2, or --devices 5",
        ),
        ([Wish(n, 1, None) for n in "abc"], 2, "at most 2 of them with a device each"),
        ([Wish("a", 4, 2), Wish("b", 1, None)], 8, "got 2 for 'a', allowed: at least 4"),
    ],
)
def test_plans_that_do_not_fit_are_refused_with_what_would(
    wishes: list[Wish], devices: int, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        divide(wishes, devices)
    assert said in str(caught.value)


def test_one_model_has_all_cores_and_several_theirs() -> None:
    one = config("a", devices=2)
    assert share([one], 16, None) == [(one, 16)]
    two = share([config("a"), config("b", devices=3)], 16, 4)
    assert [(found.blueprint.devices, cores) for found, cores in two] == [(1, 4), (3, 12)]
    crowded = share([config("a"), config("b"), config("c")], 2, 3)
    assert [cores for _, cores in crowded] == [1, 1, 1]
