import pytest

from scalellm.bench.search import RateSearch
from scalellm.bench.slo import Slo, parse_slo
from scalellm.errors import ConfigError

COLUMNS = ["outcome", "start_ms", "ttft_ms", "tbt_ms", "max_gap_ms", "e2e_ms"]


def row(*requests, duration_s: float = 2.0):
    rows = [[*request] for request in requests]
    return {"duration_s": duration_s, "records": {"columns": COLUMNS, "rows": rows}}


def done(start_ms: float, ttft_ms: float, tbt_ms: float | None = 1.0):
    return ("completed", start_ms, ttft_ms, tbt_ms, tbt_ms, ttft_ms + 100.0)


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    slo = parse_slo("ttft=100, tbt=10", 0.5)
    judged = slo.judge(
        row(
            done(0, 100.0, 10.0),
            done(1, 101.0, 1.0),
            done(2, 1.0, 11.0),
            done(3, 1.0, None),
            ("timed_out", 4, None, None, None, 60_000.0),
            ("status", 5, None, None, None, 1.0),
        )
    )
    assert judged["share"] == pytest.approx(2 / 6)
    assert judged["goodput_request_s"] == 1.0
    assert not judged["held"]


def test_a_queue_that_grows_is_seen_in_the_later_half() -> None:
    slo = Slo({"ttft": 100.0}, share=0.7)
    requests = [done(at, 10.0 * at) for at in range(14)]
    judged = slo.judge(row(*reversed(requests)))
    assert judged["share"] > 0.7
    assert judged["later_share"] < 0.7
    assert not judged["held"]


def test_a_level_without_requests_holds_nothing() -> None:
    assert not Slo({"ttft": 1.0}).judge(row(duration_s=0.0))["held"]


@pytest.mark.parametrize("text", ["", "ttft", "ttft=x", "ttft=-1", "latency=5", "ttft=1,,"])
def test_bad_objectives_name_what_is_allowed(text) -> None:
    with pytest.raises(ConfigError, match=r"--slo: got .* allowed: ttft=MS, tbt=MS"):
        parse_slo(text, 0.9)
    with pytest.raises(ConfigError, match="--slo-share: got 0"):
        parse_slo("ttft=1", 0.0)


def searched(limit: float, start: float, **options) -> RateSearch:
    """A search at a server that holds every rate up to `limit`."""
    search = RateSearch(start, **options)
    while (rate := search.next_rate()) is not None:
        search.tell(rate, rate <= limit)
    return search


@pytest.mark.parametrize("limit", [0.07, 0.9, 1.0, 7.3, 1234.0])
@pytest.mark.parametrize("start", [1.0, 16.0])
def test_the_highest_rate_is_found_within_the_precision(limit, start) -> None:
    search = searched(limit, start, most_probes=40)
    assert search.is_found
    assert search.held <= limit < search.missed
    assert search.missed / search.held <= 1.06
    assert len(search.probes) == len({rate for rate, _ in search.probes}), "no rate twice"


def test_the_search_ends_where_nothing_holds_or_everything_does() -> None:
    never, always = searched(0.0, 8.0), searched(1e12, 8.0)
    assert (never.held, always.missed) == (None, None)
    assert len(never.probes) == len(always.probes) == 16
    assert not never.is_found
    assert not always.is_found


def test_a_miss_below_a_hold_bounds_the_answer() -> None:
    search = RateSearch(4.0)
    for rate, held in ((4.0, True), (8.0, False), (5.66, True), (5.0, False)):
        search.tell(rate, held)
    assert (search.held, search.missed) == (4.0, 5.0)
