"""Decisions that are kept can be taken again, whatever became of the file meanwhile."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from scalellm.cli.main import main
from scalellm.controller.blueprint.journal import Policy, replay
from scalellm.controller.blueprint.policy import Settings
from scalellm.errors import ConfigError

from .test_policy import NARROW, NODE, WIDE, signals


def policy(file: Path, journal_bytes: float = math.inf) -> Policy:
    settings = Settings("latency")
    return Policy(NODE, settings, (NARROW, WIDE), 0.0, file, journal_bytes=journal_bytes)


def decide(made: Policy, seconds: range) -> None:
    for now_s in seconds:
        made.decide(signals(WIDE, 2, 0.5, float(now_s)))


def times(file: Path) -> list[float]:
    """When the decisions of a file were taken; fails where one would be another today."""
    taken = list(replay(file))
    assert all(told == decision.to_json() for _, told, decision in taken)
    return [found.now_s for found, _, _ in taken]


def test_journal_replays_to_the_same_decisions(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    draw = random.Random(3)
    policy = Policy(NODE, Settings("latency"), (NARROW, WIDE), 0.0, path)
    blueprint = WIDE
    for now_s in range(120):
        running = 2 if now_s < 60 else 300
        found = signals(blueprint, running, draw.random(), now_s + draw.random())
        found = replace(
            found,
            tbt_ms=draw.uniform(5, 50),
            ttft_ms=draw.uniform(10, 90),
            pause_ms=draw.uniform(100, 900),
            kv_use=draw.random(),
        )
        blueprint = policy.decide(found).blueprint
    assert policy.state.ttft_factor != 1.0 and policy.state.pause_ms
    taken = list(replay(path))
    assert len(taken) == 120
    assert sum(decision.switch for _, _, decision in taken) == 1
    assert all(told == decision.to_json() for _, told, decision in taken)
    path.write_text('{"signals": 1}\n')
    with pytest.raises(ConfigError, match="line 1"):
        list(replay(path))


def test_a_journal_that_cannot_be_written_stops_no_decision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy(NODE, Settings("latency"), (NARROW, WIDE), 0.0, tmp_path)
    assert policy.decide(signals(WIDE, 2, 0.0, 0.0)).blueprint == WIDE
    assert capsys.readouterr().err.count("journal ends here") == 1


def test_a_full_journal_goes_aside_and_each_file_can_be_taken_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, aside = tmp_path / "j.jsonl", tmp_path / "j.jsonl.1"
    decide(policy(file, 20_000), range(100))
    assert sorted(tmp_path.iterdir()) == [file, aside]
    assert all(found.stat().st_size <= 20_000 for found in (file, aside))
    before, after = times(aside), times(file)
    assert len(before) > 10
    assert [*before, *after] == [float(at) for at in range(100 - len(before + after), 100)]
    for found in (file, aside):
        assert main(["simulate", "--replay", str(found)]) == 0
    assert capsys.readouterr().out.count("0 taken differently") == 2


def test_a_restarted_controller_goes_on_in_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    decide(policy(file), range(3))
    decide(policy(file), range(3, 5))
    heads = [line for line in file.read_text().splitlines() if "journal" in json.loads(line)]
    assert len(heads) == 2
    assert times(file) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_journal_that_somebody_removes_begins_again(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    made = policy(file)
    decide(made, range(3))
    file.unlink()
    decide(made, range(3, 5))
    assert times(file) == [3.0, 4.0]
