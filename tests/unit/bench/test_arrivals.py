import numpy as np
import pytest

from scalellm.bench.arrivals import Arrivals, parse_arrivals
from scalellm.errors import ConfigError

RATE = 50.0


def times(how: str, seed: int = 7, number: int | None = 20_000, until_s: float | None = None):
    return parse_arrivals(how).times_s(RATE, np.random.default_rng(seed), number, until_s)


@pytest.mark.parametrize(
    ("how", "cv"), [("poisson", 1.0), ("constant", 0.0), ("gamma:3", 3.0), ("gamma:0.5", 0.5)]
)
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(how, cv) -> None:
    gaps = np.diff(times(how))
    assert gaps.mean() == pytest.approx(1 / RATE, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08, abs=1e-9)


def test_bursts_keep_the_rate_and_are_silent_between() -> None:
    found = times("onoff:2/8", until_s=1000.0, number=None)
    assert len(found) / 1000.0 == pytest.approx(RATE, rel=0.05)
    assert (found % 10.0 < 2.0).all()


@pytest.mark.parametrize("how", ["poisson", "constant", "gamma:4", "onoff:1/1"])
def test_times_ascend_and_end_by_number_or_by_time(how) -> None:
    found = times(how, number=10_000)
    assert len(found) == 10_000
    assert (np.diff(found) >= 0).all()
    assert found[0] >= 0
    assert times(how, number=None, until_s=3.0).max() < 3.0
    assert len(times(how, number=5, until_s=1000.0)) == 5


def test_the_seed_decides_the_times() -> None:
    assert (times("poisson", 1) == times("poisson", 1)).all()
    assert (times("poisson", 1) != times("poisson", 2)).any()


def test_constant_arrivals_begin_at_once() -> None:
    assert times("constant", number=3) == pytest.approx([0.0, 0.02, 0.04])


@pytest.mark.parametrize(
    "text", ["", "uniform", "poisson:2", "gamma", "gamma:0", "gamma:x", "onoff:1", "onoff:0/1"]
)
def test_unknown_processes_are_refused_with_what_is_allowed(text) -> None:
    with pytest.raises(ConfigError, match=r"arrivals: got .*gamma:CV"):
        parse_arrivals(text)


def test_a_level_without_a_send_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 sends"):
        Arrivals().times_s(1e-6, np.random.default_rng(0), None, 1.0)
