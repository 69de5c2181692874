import json

import pytest

from scalellm._core import run_load
from scalellm.bench.machine import describe_machine
from scalellm.bench.plan import Level, Workload, closed_level, open_level
from scalellm.bench.shapes import Prompt
from scalellm.bench.table import milliseconds
from scalellm.errors import ConfigError


def test_a_closed_level_gives_every_client_its_rounds() -> None:
    level = closed_level(64, 4, None, None, None)
    assert (level.requests, level.warmup, level.duration_s) == (256, 16, None)
    assert closed_level(1, 4, None, None, None).requests == 8
    assert closed_level(8, 4, None, 5.0, 0) == Level(8, duration_s=5.0)


def test_an_open_level_lasts_half_a_minute_unless_told() -> None:
    assert open_level(2.5, "poisson", None, None, None).duration_s == 30.0
    assert open_level(2.5, "constant", 9, None, 0) == Level(
        rate=2.5, arrivals="constant", requests=9
    )


def test_a_level_is_closed_or_open_and_ends() -> None:
    for fields in ({}, {"concurrency": 1, "rate": 1.0, "requests": 1}, {"concurrency": 1}):
        with pytest.raises(ConfigError):
            Level(**fields)


def test_the_key_is_in_the_plan_and_nowhere_that_is_printed() -> None:
    prompts = [Prompt(text="a"), Prompt(token_ids=(1, 2))]
    level = Level(concurrency=1, requests=1)
    plan = json.loads(Workload().plan_json(level, None, prompts, "http://h", "m", "secret", False))
    assert plan["api_key"] == "secret"
    assert plan["prompts"] == [{"text": "a"}, {"token_ids": [1, 2]}]


def test_the_load_generator_refuses_a_bad_plan_by_name() -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        level = Level(concurrency=1, requests=1)
        prompts = [Prompt(text="a")]
        run_load(Workload(timeout_s=-1).plan_json(level, None, prompts, "http://h", "m", "", False))


def test_an_error_in_the_progress_callback_ends_the_run_and_is_raised() -> None:
    def broken(_: str) -> bool:
        raise RuntimeError("drawing failed")

    level = Level(concurrency=1, duration_s=600.0)
    plan = Workload().plan_json(
        level, None, [Prompt(text="a")], "http://127.0.0.1:1", "m", "", False
    )
    with pytest.raises(RuntimeError, match="drawing failed"):
        run_load(plan, broken)


def test_milliseconds_keep_three_digits() -> None:
    assert [milliseconds(value) for value in (None, 0.123, 12.34, 1234.5)] == [
        "-", "0.12", "12.3", "1234",
    ]  # fmt: skip


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    machine = describe_machine()
    assert machine["cpu"]
    assert machine["memory_bytes"] > 0
    assert platform.node() not in json.dumps(machine)
