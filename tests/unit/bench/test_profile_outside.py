"""Profiles of endpoints that tell nothing."""

import pytest
from rich.console import Console

from scalellm.bench.plan import Level, Workload
from scalellm.bench.profile import ProfileOptions, run_profile
from scalellm.errors import ConfigError

from .conftest import FakeEndpoint

QUIET = Console(quiet=True)


def test_a_foreign_endpoint_is_seen_from_outside(endpoint: FakeEndpoint) -> None:
    endpoint.behaviour.token_gap_s = 0.005
    level = Level(2, requests=8)
    workload = Workload(input_tokens=32, output_tokens=4)
    options = ProfileOptions(endpoint.url, (level,), workload)
    profile = run_profile(options, QUIET)
    (found,) = profile.levels
    outside = found.outside
    assert profile.measured and profile.failed == 0
    assert found.inside is None and outside is not None
    assert outside.front_ttft_ms is not None and outside.round_trip_ms is not None
    assert outside.tbt_ms is not None and outside.tbt_ms >= 5.0
    assert sum(ms for _, ms in outside.ttft_parts()) == pytest.approx(outside.ttft_ms)
    parts = profile.to_json()["levels"][0]["outside"]["ttft_parts"]
    assert parts[0][0] == "round trip"


def test_without_the_baseline_only_the_endpoint_is_measured(endpoint: FakeEndpoint) -> None:
    workload = Workload(input_tokens=32, output_tokens=4)
    levels = (Level(1, requests=2),)
    options = ProfileOptions(endpoint.url, levels, workload, baseline=False)
    (found,) = run_profile(options, QUIET).levels
    assert found.outside is not None and found.outside.front_ttft_ms is None
    assert found.outside.short_prompt_ttft_ms is not None


def test_more_requests_than_a_gateway_keeps_are_refused() -> None:
    options = ProfileOptions("http://127.0.0.1:9", (Level(1, requests=4090, warmup=8),))
    with pytest.raises(ConfigError, match="requests: got 4090, allowed: up to 4088"):
        run_profile(options, QUIET)
