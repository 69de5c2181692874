"""Stages from known times: they add up, and the largest is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalellm.bench.plan import Level
from scalellm.bench.profile import LevelProfile, Profile
from scalellm.bench.profile_outside import Outside
from scalellm.bench.profile_stages import (
    Joined,
    between_tokens,
    first_token,
    whole_answer,
)
from scalellm.bench.profile_table import predictions
from scalellm.bench.profile_told import ReplicaSteps
from scalellm.bench.profile_trace import write_trace


def told(prefill_ms: int = 40, started_us: int = 1_000_000, id: str = "r") -> dict[str, Any]:
    """A request of 11 tokens: 10 ms before the engine, 4 ms a token, all of it in known stages."""
    prefill_us = prefill_ms * 1000
    first_us = 10_000 + prefill_us + 500
    return {
        "id": id,
        "route": "/v1/completions",
        "replica": "unix:/e",
        "status": 200,
        "started_us": started_us,
        "prompt_tokens": 7,
        "cached_tokens": 0,
        "output_tokens": 11,
        "longest_choice_tokens": 11,
        "stages_us": {
            "accept": 100,
            "parse": 900,
            "tokenise": 6_000,
            "link_out": 1_000,
            "queue": 2_000,
            "prefill": prefill_us,
            "emit": 100,
            "link_back": 300,
            "first": first_us,
            "detokenise": 1_100,
            "serialise": 2_200,
            "write": 330,
            "total": first_us + 41_000,
        },
        "first": {
            "detokenise_us": 100,
            "serialise_us": 200,
            "handed_us": first_us + 200,
            "written_us": first_us + 230,
        },
        "last_tokens_us": first_us + 41_000,
        "engine": {
            "first_token_us": 2_000_000,
            "finished_us": 2_040_000,
            "prefill_us": {"sample": 1_000, "forward/linear": prefill_us - 2_000, "schedule": 1000},
            "decode_us": {"forward/linear": 30_000, "schedule": 4_000, "sample": 6_000},
            "steps": 11,
            "preemptions": 0,
        },
    }


def joined(ttft_ms: float, tbt_ms: float | None, *requests: dict[str, Any]) -> list[Joined]:
    """With what their clients measured."""
    return [(request, {"ttft_ms": ttft_ms, "tbt_ms": tbt_ms}) for request in requests]


def test_the_first_tokens_stages_add_up_to_what_the_client_saw() -> None:
    waterfall = first_token(joined(61.0, None, told()) + joined(81.0, None, told(60)))
    assert sum(share.mean_ms for share in waterfall.shares) == pytest.approx(71.0)
    assert sum(share.share for share in waterfall.shares) == pytest.approx(1.0)
    by_stage = {share.stage: share for share in waterfall.shares}
    assert by_stage["prefill: forward/linear"].mean_ms == pytest.approx(48.0)
    assert by_stage["prefill: forward/linear"].p99_ms == pytest.approx(57.8)
    # 0.1 ms of the wait is in no stage; the client's extra is its own.
    assert by_stage["between stages"].mean_ms == pytest.approx(0.0, abs=0.2)
    assert by_stage["socket and client"].mean_ms == pytest.approx(71.0 - 60.73)
    assert waterfall.inside_ms == pytest.approx(60.73)
    assert waterfall.largest is by_stage["prefill: forward/linear"]
    assert waterfall.largest.without_ms(71.0) == pytest.approx(23.0)


def test_a_steps_phases_stand_in_their_order() -> None:
    stages = [share.stage for share in first_token(joined(51.0, None, told())).shares]
    prefill = [stage for stage in stages if stage.startswith("prefill: ")]
    assert prefill == ["prefill: schedule", "prefill: forward/linear", "prefill: sample"]
    assert stages.index("queue") < stages.index("prefill: schedule") < stages.index("emit")


def test_a_token_is_the_engines_step_and_what_the_gateway_falls_behind() -> None:
    waterfall = between_tokens(joined(51.0, 4.2, told()))
    by_stage = {share.stage: share.mean_ms for share in waterfall.shares}
    assert by_stage == pytest.approx(
        {
            "step: schedule": 0.4,
            "step: forward/linear": 3.0,
            "step: sample": 0.6,
            "falling behind": 0.1,
            "socket and client": 0.1,
        }
    )


def test_time_that_the_engine_does_not_tell_is_shown() -> None:
    request = told()
    request["engine"]["decode_us"] = {"forward": 10_000}
    by_stage = {share.stage: share for share in between_tokens(joined(51.0, 4.1, request)).shares}
    assert by_stage["step: not told"].mean_ms == pytest.approx(3.0)


def test_a_cause_counts_in_the_answer_wherever_it_was() -> None:
    first, token = (
        first_token(joined(51.0, None, told())),
        between_tokens(joined(51.0, 4.2, told())),
    )
    answer = whole_answer(first, token, tokens=11)
    assert answer.whole_ms == pytest.approx(51.0 + 42.0)
    linear = next(share for share in answer.shares if share.stage == "forward/linear")
    assert linear.mean_ms == pytest.approx(38.0 + 30.0)
    assert sum(share.mean_ms for share in answer.shares) == pytest.approx(answer.whole_ms)


def test_predictions_are_amdahls() -> None:
    (largest, *_) = predictions("each further token", between_tokens(joined(51.0, 4.2, told())))
    assert "step: forward/linear (engine) is largest, 71%" in largest
    assert "4.20 -> 1.20 ms, 3.50x" in largest


def test_answers_of_one_token_and_unknown_engines_have_no_time_a_token() -> None:
    short, strange = told(), told()
    short["longest_choice_tokens"] = 1
    strange["engine"] = None
    waterfall = between_tokens(joined(1.0, 1.0, short, strange))
    assert [share.stage for share in waterfall.shares] == ["socket and client"]


def test_what_shows_from_outside_adds_up() -> None:
    outside = Outside(0.5, 20.0, 2.0, None, 100.0, 10.0)
    parts = dict(outside.ttft_parts())
    assert list(parts.values()) == pytest.approx([0.5, 1.5, 18.0, 80.0])
    assert sum(parts.values()) == pytest.approx(100.0)
    # A baseline that is slower than the endpoint takes nothing away twice.
    slow_front = Outside(0.5, 20.0, 200.0, None, 100.0, None)
    assert sum(ms for _, ms in slow_front.ttft_parts()) == pytest.approx(100.0)


def test_a_traces_slices_lie_within_their_request_and_rows_do_not_overlap(tmp_path: Path) -> None:
    step = {
        "number": 3,
        "started_us": 1_010_000,
        "requests": 2,
        "tokens": 9,
        "phases_us": {"schedule": 100, "forward": 900},
    }
    requests = (told(), told(started_us=1_020_000), told(started_us=2_000_000))
    level = LevelProfile(
        Level(concurrency=1, requests=3),
        {"completed": 3, "failed": 0, "timed_out": 0},
        None,
        None,
        requests,
        (ReplicaSteps("unix:/e", (step,), None),),
        (),
    )
    write_trace(Profile({}, {}, {}, (level,)), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    whole = [event for event in slices if event["name"] == "request"]
    assert [event["tid"] for event in whole] == [0, 1, 0]
    assert min(event["ts"] for event in slices) == 0
    for event in slices:
        if event["pid"] == 1:
            assert any(
                outer["tid"] == event["tid"]
                and outer["ts"] <= event["ts"]
                and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"]
                for outer in whole
            ), event
    steps = [(e["name"], e["ts"], e["dur"]) for e in slices if e["pid"] == 2]
    assert steps == [
        ("step 3", 10_000, 1_000),
        ("schedule", 10_000, 100),
        ("forward", 10_100, 900),
    ]
