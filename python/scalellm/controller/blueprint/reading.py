"""What a gateway says of one model at one moment, and how that follows from its /metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalellm.controller.gateway_view import Sample, replica_states

Histogram = Mapping[float, float]  # upper bound in seconds -> requests up to it

_TTFT = "gen_ai_server_time_to_first_token_seconds"
_TBT = "gen_ai_server_time_per_output_token_seconds"
_PAUSE = "scalellm_hand_over_pause_seconds"
_STEP_COST = "scalellm_replica_step_cost_ms"
_TERMS = ("step", "token", "attended", "request")
_LIVING = ("ready", "draining")


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters count from the gateway's start, a request when it has ended."""

    at_s: float
    answered: float  # requests that had a first token
    prompt_tokens: float
    cached_tokens: float
    output_tokens: float
    ttft: Histogram
    tbt: Histogram
    pauses: Histogram  # of streams that went on at another replica
    running: float
    waiting: float  # in engines and gateway
    backlog_tokens: float
    kv_blocks_used: float
    kv_blocks_total: float
    step_costs: Sequence[Sequence[float]] = ()  # of each replica that is ready, by _TERMS

    @property
    def present(self) -> float:
        """Requests that are there."""
        return self.running + self.waiting

    @property
    def kv_use(self) -> float:
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0


def reading_of(now_s: float, samples: Sequence[Sample]) -> Reading:
    """`samples` are those of one model."""
    states = replica_states(list(samples))
    # Of a replica that is gone the gateway tells the last it heard.
    living = [
        found
        for found in samples
        if states.get(found.labels.get("replica", ""), "ready") in _LIVING
    ]
    queued = _sum(samples, "scalellm_queued_requests")
    return Reading(
        now_s,
        _sum(samples, f"{_TTFT}_count"),
        _sum(samples, "scalellm_prompt_tokens_total"),
        _sum(samples, "scalellm_cached_tokens_total"),
        _sum(samples, "scalellm_output_tokens_total"),
        _histogram(samples, _TTFT),
        _histogram(samples, _TBT),
        _histogram(samples, _PAUSE),
        _sum(living, "scalellm_replica_running_requests"),
        _sum(living, "scalellm_replica_waiting_requests") + queued,
        _sum(living, "scalellm_replica_backlog_tokens"),
        _sum(living, "scalellm_replica_kv_blocks_used"),
        _sum(living, "scalellm_replica_kv_blocks_total"),
        _step_costs(samples, states),
    )


def _sum(samples: Sequence[Sample], name: str) -> float:
    return sum(sample.value for sample in samples if sample.name == name)


def _histogram(samples: Sequence[Sample], name: str) -> Histogram:
    found: dict[float, float] = {}
    for sample in samples:
        if sample.name == f"{name}_bucket":
            bound_s = float(sample.labels.get("le", math.inf))  # also of "+Inf"
            found[bound_s] = found.get(bound_s, 0.0) + sample.value
    return found


def _step_costs(samples: Sequence[Sample], states: Mapping[str, str]) -> list[list[float]]:
    fitted: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.name == _STEP_COST and states.get(sample.labels["replica"]) == "ready":
            fitted.setdefault(sample.labels["replica"], {})[sample.labels["of"]] = sample.value
    return [[found.get(term, 0.0) for term in _TERMS] for found in fitted.values()]
