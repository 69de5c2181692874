"""Requests over time: tokens in a part of a level, and the gaps that a switch made."""

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from blueprint.deployment import Seen
from scalellm.bench.records import Records
from scalellm.bench.results import Row

_SETTLED_S = 2.0  # after a hand-over, until its last gaps have ended


@dataclass(frozen=True, slots=True)
class Span:
    """From one Unix time to another."""

    begin_s: float
    end_s: float


def switches(seen: Sequence[Seen]) -> list[Span]:
    """From each decision to the end of its hand-over."""
    return _spans(seen, ("starting", "handing over"))


def hand_overs(seen: Sequence[Seen]) -> list[Span]:
    """The parts of the switches in which requests move."""
    return _spans(seen, ("handing over",))


def _spans(seen: Sequence[Seen], begins: Container[str]) -> list[Span]:
    """From the first of these phases to the next steady one."""
    found: list[Span] = []
    began_s: float | None = None
    for one in seen:
        if began_s is None and one.phase in begins:
            began_s = one.at_s
        elif began_s is not None and one.phase == "steady":
            found.append(Span(began_s, one.at_s))
            began_s = None
    return found


def span_of(row: Row) -> Span:
    """Of a level: from its first send to the last; what ends later is left out of rates."""
    begin_s = row["started_us"] / 1e6
    requests = Records.of(row).by_start()
    return Span(begin_s, begin_s + max(float(one["start_ms"]) for one in requests) / 1e3)


def settled(level: Span, all_switches: Sequence[Span]) -> Span:
    """What is left of a level after the switches that end in it."""
    inside = [one.end_s for one in all_switches if level.begin_s <= one.end_s <= level.end_s]
    return Span(max([level.begin_s, *inside]), level.end_s)


def tokens_s(row: Row, span: Span) -> float:
    times = np.array([at for one in Records.of(row).completed() for at in _times(one, row)])
    inside = np.count_nonzero((times >= span.begin_s) & (times < span.end_s))
    return float(inside) / max(1e-9, span.end_s - span.begin_s)


def tbt_ms(row: Row, span: Span) -> float:
    """The median of the requests that began in the span."""
    level_s = row["started_us"] / 1e6
    found = [
        float(one["tbt_ms"])
        for one in Records.of(row).completed()
        if span.begin_s <= level_s + one["start_ms"] / 1e3 < span.end_s
    ]
    return median(found) if found else float("nan")


def pauses_ms(rows: Sequence[Row], moves: Sequence[Span]) -> list[float]:
    """The largest gap of each request that had tokens before and after a hand-over's begin."""
    found = []
    for row in rows:
        for one in Records.of(row).completed():
            times = _times(one, row)
            for move in moves:
                end_s = move.end_s + _SETTLED_S
                gaps = [
                    1e3 * (after - before)
                    for before, after in itertools.pairwise(times)
                    if after >= move.begin_s and before <= end_s
                ]
                if gaps and times[0] < move.begin_s:
                    found.append(max(gaps))
    return found


def _times(request: Mapping[str, Any], row: Row) -> list[float]:
    """Unix times of a request's chunks."""
    return list(_chunks(request, row["started_us"] / 1e6))


def _chunks(request: Mapping[str, Any], level_s: float) -> Iterator[float]:
    at_s = level_s + (request["start_ms"] + request["ttft_ms"]) / 1e3
    yield at_s
    for gap_us in request["gaps_us"]:
        at_s += gap_us / 1e6
        yield at_s
