"""How long one kernel takes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from scalellm.bench.floor import Cost

_LEAST_CALLS = 3
# What kernels read in turn: far above any cache.
ROUND_BYTES = 160 << 20


@dataclass(frozen=True, slots=True)
class Timed:
    """One line of the table; `cost` is None for ops that no ceiling was measured for."""

    op: str
    shape: str
    seconds: float
    cost: Cost | None


def median_s(call: Callable[[], object], seconds: float) -> float:
    """Median of calls over about `seconds`, at least three, after one that does not count."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _LEAST_CALLS or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copies_of(num_bytes: float) -> int:
    """How many of them make a round."""
    return max(1, round(ROUND_BYTES / num_bytes))
