"""Figures of a deployment that changes its shape: from records and what was seen of it."""

from typing import Any

import bench_switching
import pytest
from blueprint import series
from blueprint.deployment import Seen

COLUMNS = ("outcome", "start_ms", "ttft_ms", "tbt_ms", "output_tokens", "gaps_us")


def row(*requests: tuple[float, float, list[float]]) -> dict[str, Any]:
    """A level from Unix time 100; requests by start, TTFT and gaps, in ms."""
    rows = [
        ("completed", start, ttft, sum(gaps) / len(gaps), 1 + len(gaps), [1e3 * g for g in gaps])
        for start, ttft, gaps in requests
    ]
    return {"started_us": 100_000_000, "records": {"columns": COLUMNS, "rows": rows}}


SEEN = [
    Seen(99.0, "steady", "1 x TP 2"),
    Seen(101.0, "starting", "2 x TP 1"),
    Seen(103.0, "handing over", "2 x TP 1"),
    Seen(104.0, "steady", "2 x TP 1"),
    Seen(200.0, "handing over", "1 x TP 2"),
]


def test_a_switch_ends_when_the_old_replicas_are_gone() -> None:
    assert series.switches(SEEN) == [series.Span(101.0, 104.0)]
    assert series.hand_overs(SEEN) == [series.Span(103.0, 104.0)]


def test_rates_and_times_of_a_part_of_a_level() -> None:
    level = row((0.0, 1000.0, [1000.0] * 9), (5000.0, 500.0, [2000.0, 2000.0]))
    assert series.span_of(level) == series.Span(100.0, 105.0)
    # tokens at 101, 102, ... 110 and at 105.5, 107.5, 109.5
    assert series.tokens_s(level, series.Span(104.5, 108.5)) == pytest.approx(6 / 4)
    assert series.tbt_ms(level, series.Span(104.5, 108.5)) == 2000.0
    rest = series.settled(series.Span(100.0, 110.0), series.switches(SEEN))
    assert rest == series.Span(104.0, 110.0)


def test_a_pause_is_the_largest_gap_of_what_ran_when_requests_moved() -> None:
    before = (0.0, 100.0, [900.0, 900.0, 900.0, 2500.0, 300.0])  # 100.1 .. 102.8, 105.3
    later = (4000.0, 100.0, [3000.0])
    assert series.pauses_ms([row(before, later)], series.hand_overs(SEEN)) == [
        pytest.approx(2500.0)
    ]


def levels(tbt_ms: float, tok_s: float, switches: int = 0) -> dict[str, Any]:
    few = {"concurrency": 1, "tbt_ms": tbt_ms, "settled_tbt_ms": tbt_ms}
    many = {"concurrency": 64, "tok_s": tok_s, "settled_tok_s": tok_s, "tbt_ms": 9.0}
    rest = {"failed": 0, "wrong_length": 0, "max_gap_ms": 1.0}
    return {
        "levels": [few | rest, many | rest, few | rest],
        "switches": [{"begin_s": 1.0, "end_s": 4.0}] * switches,
        "pauses_ms": [],
        "machine": "a machine",
        "seconds": [1.0, 2.0, 3.0],
    }


def test_without_a_crossover_a_slow_link_has_to_make_one() -> None:
    found = {"memory-wide": levels(4.0, 900.0), "memory-narrow": levels(7.0, 800.0)}
    assert bench_switching.lacking(found) == [
        *("memory-auto", "link-wide", "link-narrow", "link-auto", "link-after")
    ]
    found |= {"memory-auto": levels(4.1, 880.0)}
    found |= {"link-wide": levels(5.0, 300.0), "link-narrow": levels(7.0, 800.0)}
    found |= {"link-auto": levels(5.2, 790.0, switches=2)}
    found |= {"link-after": levels(5.2, 700.0, switches=2) | {"pauses_ms": [900.0]}}
    assert bench_switching.lacking(found) == []
    assert bench_switching.failures(found) == []
    text = bench_switching.section(found, "the command")
    assert "has no clear crossover" in text
    assert "Without room for both shapes: switches took 3.0, 3.0 s; the largest gap" in text
    for wrong, named in (
        (levels(5.2, 790.0, switches=0), "0 switches"),
        (levels(5.2, 600.0, switches=2), "tokens/s is 0.75"),
        (levels(5.2, 790.0, switches=2) | {"pauses_ms": [1600.0]}, "pauses of 1600 ms"),
    ):
        (problem,) = bench_switching.failures(found | {"link-auto": wrong})
        assert named in problem
    still = levels(5.2, 700.0) | {"pauses_ms": [6000.0]}
    problems = bench_switching.failures(found | {"link-after": still})
    assert "0 switches one after" in problems[0] and "pauses of 6000 ms" in problems[1]
    assert "Goals that this run misses: link: 0" in bench_switching.section(
        found | {"link-after": still}, "the command"
    )
    (problem,) = bench_switching.failures(found | {"link-wide": levels(5.0, 700.0)})
    assert "makes no crossover either" in problem


def test_a_crossover_needs_no_link() -> None:
    found = {"memory-wide": levels(4.0, 700.0), "memory-narrow": levels(7.0, 900.0)}
    assert bench_switching.lacking(found) == ["memory-auto", "memory-after"]
    found["memory-wide"] = levels(4.0, 890.0)  # within what a policy should not move for
    assert bench_switching.lacking(found)[1:] == [
        *("link-wide", "link-narrow", "link-auto", "link-after")
    ]
