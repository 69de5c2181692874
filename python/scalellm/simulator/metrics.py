"""What the gateway would count of simulated requests (crates/gateway/src: metrics.rs, observe.rs).

The controller's `Measured` reads it, so that a simulated policy sees no more than a real one.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from scalellm.controller.blueprint.reading import Reading
from scalellm.simulator.replica import SimulatedReplica

# Upper bounds of the buckets of each of the gateway's histograms, in seconds.
BOUNDS_S = (
    *(0.000_01, 0.000_03, 0.000_1, 0.000_3, 0.001, 0.002_5, 0.005, 0.01, 0.02, 0.03, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)


class Histogram:
    """Requests by the bucket that a time of theirs falls into."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(BOUNDS_S) + 1)

    def observe_ms(self, ms: float) -> None:
        """Nothing for NaN, which is a time that a request does not have."""
        if not math.isnan(ms):
            self._buckets[bisect_left(BOUNDS_S, ms / 1e3)] += 1

    def cumulative(self) -> dict[float, float]:
        return dict(zip((*BOUNDS_S, math.inf), accumulate(self._buckets), strict=True))


class Metrics:
    """Of one model, since the simulation began."""

    def __init__(self) -> None:
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._ttft, self._tbt, self._pauses = Histogram(), Histogram(), Histogram()

    def ended(
        self, prompt_tokens: int, cached_tokens: int, output_tokens: int,
        ttft_ms: float, tbt_ms: float,
    ) -> None:  # fmt: skip
        """A request that was let in, and then answered or not: all is told at the end."""
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached_tokens
        self._output_tokens += output_tokens
        self._ttft.observe_ms(ttft_ms)
        self._tbt.observe_ms(tbt_ms)

    def went_on(self, pause_ms: float) -> None:
        """A stream that was moved got its next token."""
        self._pauses.observe_ms(pause_ms)

    def reading(self, now_ms: float, replicas: Sequence[SimulatedReplica], queued: int) -> Reading:
        """`queued`: in the gateway."""
        schedulers = [replica.scheduler for replica in replicas]
        ttft = self._ttft.cumulative()
        return Reading(
            now_ms / 1e3,
            ttft[math.inf],
            self._prompt_tokens,
            self._cached_tokens,
            self._output_tokens,
            ttft,
            self._tbt.cumulative(),
            self._pauses.cumulative(),
            sum(found.num_running for found in schedulers),
            sum(found.num_waiting for found in schedulers) + queued,
            sum(found.backlog_tokens for found in schedulers),
            sum(replica.kv_blocks_used(now_ms) for replica in replicas),
            sum(found.kv.num_blocks for found in schedulers),
            [replica.step_cost for replica in replicas],
        )
