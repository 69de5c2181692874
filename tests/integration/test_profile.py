"""The profile of systems whose times are known: shares add up to what the client measured."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from scalellm.bench.front import front_alone
from scalellm.bench.plan import Level, Workload
from scalellm.bench.profile import Inside, ProfileOptions, run_profile

from .served import Serve, own_environment

TTFT_MS, TBT_MS = 50.0, 10.0
OUTPUT_TOKENS = 16
ATTEMPTS = 4


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway before a fake engine that takes 50 ms to the first token, 10 ms a token then."""
    with front_alone({"ttft_ms": TTFT_MS, "tbt_ms": TBT_MS}) as found:
        yield found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Serve(tmp_path_factory.mktemp("profile"))
    yield server.url
    server.close()


def take_apart(url: str, concurrency: int, requests: int, endpoint: str = "chat") -> Inside:
    level = Level(concurrency, requests=requests, warmup=concurrency)
    workload = Workload(endpoint=endpoint, input_tokens=32, output_tokens=OUTPUT_TOKENS)
    profile = run_profile(ProfileOptions(url, (level,), workload), Console(quiet=True))
    (found,) = profile.levels
    assert profile.failed == 0 and found.notes == ()
    assert len(found.requests) == requests
    assert found.inside is not None
    return found.inside


def add_up(inside: Inside, within: float) -> bool:
    """Gateway and engine account for all but `within` of both waits, and count nothing twice."""
    assert inside.token is not None
    for waterfall in (inside.first, inside.token):
        # With the way to the client all of it is explained, always.
        assert sum(share.share for share in waterfall.shares) == pytest.approx(1.0)
        counted_twice = sum(share.share for share in waterfall.shares if share.share < 0)
        if abs(waterfall.inside_share - 1.0) > within or counted_twice < -0.05:
            return False
    return True


def take_apart_well(url: str, concurrency: int, requests: int, within: float = 0.05) -> Inside:
    """A client whose thread lost its core for a while read late: then measure again."""
    for _ in range(ATTEMPTS):
        inside = take_apart(url, concurrency, requests)
        if add_up(inside, within):
            return inside
    pytest.fail(f"{inside.first.inside_share:.3f} of TTFT is accounted for: {inside}")


@pytest.mark.parametrize(("concurrency", "requests"), [(1, 6), (64, 192)])
def test_shares_before_an_engine_of_known_speed(url: str, concurrency: int, requests: int) -> None:
    inside = take_apart_well(url, concurrency, requests)
    assert inside.token is not None
    first = {share.stage: share for share in inside.first.shares}
    token = {share.stage: share for share in inside.token.shares}
    assert first["prefill: forward"].mean_ms >= TTFT_MS
    # Each is due at its time, so a first token that came late makes the others come sooner.
    assert token["step: forward"].mean_ms <= 2 * TBT_MS
    stages = {"accept", "parse", "template", "tokenise", "link_out", "queue", "link_back"}
    assert stages <= first.keys()
    assert inside.first.largest is first["prefill: forward"]
    assert inside.token.largest is token["step: forward"]
    assert all(ms > 0 for ms in inside.beside_ms.values())


def test_shares_of_a_real_engine(real: str) -> None:
    # Its first token takes milliseconds, and its client waits for one of their cores.
    inside = take_apart_well(real, 4, 16, within=0.2)
    assert inside.token is not None
    stages = {share.stage for share in inside.token.shares}
    assert {"step: schedule", "step: prepare", "step: sample", "step: update"} <= stages


def test_the_command_prints_writes_and_traces(url: str, tmp_path: Path) -> None:
    result, trace = tmp_path / "p.json", tmp_path / "t.json"
    command = [sys.executable, "-m", "scalellm", "profile", "--url", url, "--concurrency", "1,4"]
    command += ["--requests", "8", "--input-tokens", "16", "--output-tokens", "4"]
    command += ["--json", str(result), "--trace", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, env=own_environment())
    assert done.returncode == 0, done.stderr
    for text in ("first token", "each further token", "prefill: forward", "is largest", "without"):
        assert text in done.stdout
    levels = json.loads(result.read_text())["levels"]
    assert [level["concurrency"] for level in levels] == [1, 4]
    assert levels[1]["ttft"]["largest"] == "prefill: forward"
    events = json.loads(trace.read_text())["traceEvents"]
    requests = [event for event in events if event["name"] == "request"]
    assert len(requests) == 16
    assert any(event["name"].startswith("step ") for event in events)
