"""Signals from readings of a gateway: counters of now against those of some seconds ago."""

import math
from collections import deque
from collections.abc import Sequence

from scalellm.controller.blueprint.reading import Histogram, Reading
from scalellm.controller.blueprint.shape import Blueprint
from scalellm.controller.blueprint.signals import QUANTILES, Signals

_LATELY_S = 5.0


class Measured:
    """Keeps readings of the last `span_s` seconds."""

    def __init__(self, span_s: float = 20.0) -> None:
        self._span_s = span_s
        self._readings: deque[Reading] = deque()
        self._prompt_tokens = 0.0  # of the last requests that ended
        self._output_tokens = 0.0

    def read(self, reading: Reading) -> None:
        """Take a reading; also while the shape changes, so that what a switch costs is in it."""
        if self._readings and reading.answered < self._readings[-1].answered:
            self._readings.clear()  # another gateway: it counts from zero
        self._readings.append(reading)
        while len(self._readings) > 1 and self._readings[0].at_s < reading.at_s - self._span_s:
            self._readings.popleft()

    def signals(self, reading: Reading, blueprint: Blueprint) -> Signals:
        """Of now, when `reading` is taken."""
        self.read(reading)
        first, last = self._readings[0], reading
        answered = last.answered - first.answered
        if answered > 0:
            prompt = last.prompt_tokens - first.prompt_tokens
            cached = last.cached_tokens - first.cached_tokens
            self._prompt_tokens = max(1.0, (prompt - cached) / answered)
            self._output_tokens = (last.output_tokens - first.output_tokens) / answered
        arrived = max(0.0, answered + last.present - first.present)
        lately = [one for one in self._readings if one.at_s > last.at_s - _LATELY_S]
        return Signals(
            last.at_s,
            blueprint,
            round(_level([one.running for one in lately])),
            round(last.waiting),
            round(_level([one.backlog_tokens for one in lately])),
            _level([one.kv_use for one in lately]),
            arrived / max(1.0, last.at_s - first.at_s),
            (self._prompt_tokens,) * len(QUANTILES) if self._prompt_tokens > 0 else (),
            self._output_tokens,
            _median_ms(first.ttft, last.ttft),
            _median_ms(first.tbt, last.tbt),
            _step_cost(last),
            _median_ms(first.pauses, last.pauses),
        )


def _level(values: Sequence[float]) -> float:
    """The mean of some seconds, as short requests come and go between two readings; no less than
    the last, as a crowd that grows is there already."""
    return max(values[-1], sum(values) / len(values))


def _step_cost(reading: Reading) -> tuple[float, ...] | None:
    """The mean over the replicas that have computed steps."""
    costs = [cost for cost in reading.step_costs if any(cost)]
    return tuple(sum(term) / len(costs) for term in zip(*costs, strict=True)) if costs else None


def _median_ms(first: Histogram, last: Histogram) -> float | None:
    """The bucket's geometric middle, within which the median of the requests in between lies."""
    grown = [(bound_s, last[bound_s] - first.get(bound_s, 0.0)) for bound_s in sorted(last)]
    if not grown or grown[-1][1] <= 0:
        return None
    below_s = 0.0
    for bound_s, number in grown:
        if number >= grown[-1][1] / 2:
            upper_s = bound_s if bound_s < math.inf else 2 * below_s
            return 1e3 * math.sqrt(max(below_s, upper_s / 3) * upper_s)
        below_s = bound_s
    return None
