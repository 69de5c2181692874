"""Compares two results: ratios, their spread, and which differences are noise.

The spread is a bootstrap's 95% interval of the ratio B / A. Where both files have three or more
runs of a level (`--repeat`), whole runs are resampled: that is the spread between runs. With fewer,
the requests of the one run are, in blocks of neighbours, as neighbours share steps and queues; what
changes from run to run is not in it, so a difference below `floor` is called noise as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scalellm.bench.records import Records
from scalellm.bench.results import Result, Row

Verdict = Literal["better", "worse", "noise", "unknown"]
_Array = NDArray[np.float64]

_RESAMPLES = 1000
_RUNS_TO_RESAMPLE = 3
_REQUESTS_TO_RESAMPLE = 8
# Fewer requests say nothing of one in a hundred.
_REQUESTS_FOR_P99 = 200
_LATENCIES = ("ttft_ms", "tbt_ms", "e2e_ms")
_THROUGHPUT = "output_tok_s"


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of one level in both results; `low` and `high` bound the ratio B / A."""

    level: str
    metric: str
    a: float
    b: float
    low: float | None
    high: float | None
    verdict: Verdict
    by: Literal["runs", "requests", "nothing"]

    @property
    def ratio(self) -> float:
        return self.b / self.a


def compare(a: Result, b: Result, floor: float = 0.02) -> list[Difference]:
    """All figures that both have, level by level."""
    found: list[Difference] = []
    rows_a, rows_b = _by_level(a), _by_level(b)
    for level in rows_a:
        if level in rows_b:
            found += _level(level, rows_a[level], rows_b[level], floor)
    return found


def remarks(a: Result, b: Result) -> list[str]:
    """Why the two may not be comparable."""
    found = []
    for what, fields in (
        ("machine", ("cpu", "cores_usable", "memory_bytes", "gpus")),
        ("workload", ("endpoint", "source", "clients", "input_tokens", "output_tokens", "stream",
                      "ignore_eos", "temperature", "extra_body", "timeout_s")),
    ):  # fmt: skip
        ours: Mapping[str, Any] = getattr(a, what)
        theirs: Mapping[str, Any] = getattr(b, what)
        found += [
            f"{what}.{field}: {ours.get(field)!r} and {theirs.get(field)!r}"
            for field in fields
            if ours.get(field) != theirs.get(field)
        ]
    levels = _by_level(a).keys() ^ _by_level(b).keys()
    if levels:
        found.append(f"levels of one only: {', '.join(sorted(levels))}")
    for name, result in (("A", a), ("B", b)):
        if result.interrupted:
            found.append(f"{name} was interrupted")
        if result.failed:
            found.append(f"{name}: {result.failed} requests failed or timed out")
        if any(row["generator"]["bottleneck"] for row in result.rows):
            found.append(f"{name}: the load generator was the bottleneck of a level")
    return found


def _by_level(result: Result) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        arrivals = row.get("arrivals")
        label = f"{row['concurrency']}" if row["rate"] is None else f"{row['rate']:g}/s {arrivals}"
        found.setdefault(label, []).append(row)
    return found


def _level(level: str, a: Sequence[Row], b: Sequence[Row], floor: float) -> Iterator[Difference]:
    closed = a[0]["rate"] is None
    for metric in _LATENCIES:
        for name, quantile in (("p50", 0.5), ("p99", 0.99)):
            if name == "p99" and min(_completed(a), _completed(b)) < _REQUESTS_FOR_P99:
                continue
            values = [_mean([row[metric][name] for row in rows]) for rows in (a, b)]
            if values[0] and values[1]:
                spread = _spread(a, b, metric, quantile)
                yield _judged(level, f"{metric} {name}", values[0], values[1], spread, floor)
    values = [_mean([row[_THROUGHPUT] for row in rows]) for rows in (a, b)]
    if values[0] and values[1]:
        # An open loop's throughput is the load's, unless the server falls behind.
        spread = _spread(a, b, _THROUGHPUT, None) if closed or _runs(a, b) else None
        yield _judged(level, _THROUGHPUT, values[0], values[1], spread, floor)


def _judged(
    level: str,
    metric: str,
    a: float,
    b: float,
    spread: tuple[_Array, Literal["runs", "requests"]] | None,
    floor: float,
) -> Difference:
    if spread is None:
        return Difference(level, metric, a, b, None, None, "unknown", "nothing")
    ratios, by = spread
    low, high = (float(bound) for bound in np.percentile(ratios, [2.5, 97.5]))
    verdict: Verdict = "noise"
    if (low > 1 or high < 1) and abs(b / a - 1) >= floor:
        more_is_better = metric.startswith(_THROUGHPUT)
        verdict = "better" if (b > a) == more_is_better else "worse"
    return Difference(level, metric, a, b, low, high, verdict, by)


def _spread(
    a: Sequence[Row], b: Sequence[Row], metric: str, quantile: float | None
) -> tuple[_Array, Literal["runs", "requests"]] | None:
    """Resampled ratios B / A; None where there is too little to resample."""
    random = np.random.default_rng(0)
    if _runs(a, b):
        field = None if quantile is None else f"p{quantile * 100:.0f}"
        runs = [
            np.array([float(row[metric] if field is None else row[metric][field]) for row in rows])
            for rows in (a, b)
        ]
        means = [_resampled(len(values), 1, random, values) for values in runs]
        return means[1].mean(axis=1) / means[0].mean(axis=1), "runs"
    resampled = [_resampled_requests(rows, metric, quantile, random) for rows in (a, b)]
    if resampled[0] is None or resampled[1] is None:
        return None
    return resampled[1] / resampled[0], "requests"


def _runs(a: Sequence[Row], b: Sequence[Row]) -> bool:
    return min(len(a), len(b)) >= _RUNS_TO_RESAMPLE


def _resampled_requests(
    rows: Sequence[Row], metric: str, quantile: float | None, random: np.random.Generator
) -> _Array | None:
    """The figure of each resampled run."""
    requests = [request for row in rows for request in Records.of(row).completed()]
    column = "e2e_ms" if quantile is None else metric
    requests = [request for request in requests if request[column] is not None]
    if len(requests) < _REQUESTS_TO_RESAMPLE:
        return None
    values = np.array([float(request[column]) for request in requests])
    # A closed loop's neighbours are those that ran at once.
    at_once = min(rows[0]["concurrency"] or 1, len(values) // 4)
    block = max(at_once, round(len(values) ** (1 / 3)))
    if quantile is not None:
        drawn = _resampled(len(values), block, random, values)
        return np.asarray(np.quantile(drawn, quantile, axis=1))
    # Clients x tokens / time, where each client is always waiting for an answer.
    tokens = np.array([float(request["output_tokens"]) for request in requests])
    index = _resampled(len(values), block, random)
    return np.asarray(tokens[index].sum(axis=1) / values[index].sum(axis=1))


def _resampled(
    number: int, block: int, random: np.random.Generator, values: _Array | None = None
) -> Any:
    """[resamples, number] indices, or the values there: blocks of neighbours, round the end."""
    blocks = -(-number // block)
    begins = random.integers(0, number, (_RESAMPLES, blocks))
    index = (begins[:, :, None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, :number] % number
    return index if values is None else values[index]


def _completed(rows: Sequence[Row]) -> int:
    return sum(row["completed"] for row in rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
