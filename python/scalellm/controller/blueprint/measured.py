"""Signals from a gateway's metrics: counters of now against those of some seconds ago."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scalellm.controller.blueprint.shape import Blueprint
from scalellm.controller.blueprint.signals import QUANTILES, Signals
from scalellm.controller.gateway_view import Sample, replica_states

_TTFT = "gen_ai_server_time_to_first_token_seconds"
_TBT = "gen_ai_server_time_per_output_token_seconds"
_PAUSE = "scalellm_hand_over_pause_seconds"
_HISTOGRAMS = (_TTFT, _TBT, _PAUSE)
_COUNTERS = (
    "scalellm_prompt_tokens_total",
    "scalellm_cached_tokens_total",
    "scalellm_output_tokens_total",
    f"{_TTFT}_count",
)
_PROMPT, _CACHED, _OUTPUT, _ENDED = _COUNTERS
_STEP_COST = "scalellm_replica_step_cost_ms"
_TERMS = ("step", "token", "attended", "request")
_LATELY_S = 5.0
_LIVING = ("ready", "draining")
_GAUGES = (
    "running_requests",
    "waiting_requests",
    "backlog_tokens",
    "kv_blocks_used",
    "kv_blocks_total",
)


@dataclass(frozen=True, slots=True)
class _Reading:
    at_s: float
    counters: Mapping[str, float]
    buckets: Mapping[tuple[str, float], float]  # (histogram, upper bound in s) -> requests
    running: float
    backlog: float
    kv_use: float
    present: float  # requests that are there, those that wait included


class Measured:
    """Keeps readings of the last `span_s` seconds; times are given by the caller."""

    def __init__(self, span_s: float = 20.0) -> None:
        self._span_s = span_s
        self._readings: deque[_Reading] = deque()
        self._prompt_tokens = 0.0  # of the last requests that ended
        self._output_tokens = 0.0

    def read(self, now_s: float, samples: Sequence[Sample]) -> None:
        """Take a reading; also while the shape changes, so that what a switch costs is in it."""
        reading = _read(now_s, samples)
        if self._readings and reading.counters[_ENDED] < self._readings[-1].counters[_ENDED]:
            self._readings.clear()  # another gateway: it counts from zero
        self._readings.append(reading)
        while len(self._readings) > 1 and self._readings[0].at_s < now_s - self._span_s:
            self._readings.popleft()

    def signals(self, now_s: float, samples: Sequence[Sample], blueprint: Blueprint) -> Signals:
        self.read(now_s, samples)
        first, last = self._readings[0], self._readings[-1]
        grown = {name: last.counters[name] - first.counters[name] for name in _COUNTERS}
        if grown[_ENDED] > 0:
            self._prompt_tokens = max(1.0, (grown[_PROMPT] - grown[_CACHED]) / grown[_ENDED])
            self._output_tokens = grown[_OUTPUT] / grown[_ENDED]
        span_s = max(1.0, now_s - first.at_s)
        arrived = max(0.0, grown[_ENDED] + last.present - first.present)
        known = self._prompt_tokens > 0
        lately = [one for one in self._readings if one.at_s > now_s - _LATELY_S]
        return Signals(
            now_s,
            blueprint,
            round(_mean(one.running for one in lately)),
            round(last.present - last.running),
            round(_mean(one.backlog for one in lately)),
            _mean(one.kv_use for one in lately),
            arrived / span_s,
            (self._prompt_tokens,) * len(QUANTILES) if known else (),
            self._output_tokens,
            _median_ms(_TTFT, first, last),
            _median_ms(_TBT, first, last),
            _step_cost(samples),
            _median_ms(_PAUSE, first, last),
        )


def _mean(values: Iterable[float]) -> float:
    """Of some seconds: short requests come and go between two readings."""
    found = list(values)
    return sum(found) / len(found)


def _sum(samples: Sequence[Sample], name: str) -> float:
    return sum(sample.value for sample in samples if sample.name == name)


def _of_living(samples: Sequence[Sample]) -> list[Sample]:
    """Without those of replicas that are gone, of which the gateway tells the last it heard."""
    states = replica_states(list(samples))
    return [
        sample
        for sample in samples
        if states.get(sample.labels.get("replica", ""), "ready") in _LIVING
    ]


def _step_cost(samples: Sequence[Sample]) -> tuple[float, ...] | None:
    """The mean over the replicas that are there and have computed steps."""
    states = replica_states(list(samples))
    fitted: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.name == _STEP_COST and states.get(sample.labels["replica"]) == "ready":
            fitted.setdefault(sample.labels["replica"], {})[sample.labels["of"]] = sample.value
    costs = [[found.get(term, 0.0) for term in _TERMS] for found in fitted.values()]
    costs = [cost for cost in costs if any(cost)]
    if not costs:
        return None
    return tuple(sum(terms) / len(costs) for terms in zip(*costs, strict=True))


def _read(now_s: float, samples: Sequence[Sample]) -> _Reading:
    buckets: dict[tuple[str, float], float] = {}
    for sample in samples:
        name = sample.name.removesuffix("_bucket")
        if name in _HISTOGRAMS and name != sample.name:
            place = (name, float(sample.labels.get("le", "inf").replace("+Inf", "inf")))
            buckets[place] = buckets.get(place, 0.0) + sample.value
    living = _of_living(samples)
    gauges = {name: _sum(living, f"scalellm_replica_{name}") for name in _GAUGES}
    running, blocks = gauges["running_requests"], gauges["kv_blocks_total"]
    queued = gauges["waiting_requests"] + _sum(samples, "scalellm_queued_requests")
    return _Reading(
        now_s,
        {name: _sum(samples, name) for name in _COUNTERS},
        buckets,
        running,
        gauges["backlog_tokens"],
        gauges["kv_blocks_used"] / blocks if blocks else 0.0,
        running + queued,
    )


def _median_ms(name: str, first: _Reading, last: _Reading) -> float | None:
    """The bucket's geometric middle, within which the median of the requests in between lies."""
    bounds = sorted(bound for found, bound in last.buckets if found == name)
    grown = [last.buckets[name, at] - first.buckets.get((name, at), 0.0) for at in bounds]
    if not grown or grown[-1] <= 0:
        return None
    below_s = 0.0
    for bound_s, number in zip(bounds, grown, strict=True):
        if number >= grown[-1] / 2:
            upper_s = bound_s if bound_s != float("inf") else 2 * below_s
            return 1e3 * float((max(below_s, upper_s / 3) * upper_s) ** 0.5)
        below_s = bound_s
    return None
