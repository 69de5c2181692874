"""What the policy sees of the load: one flat record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from scalellm.controller.blueprint.shape import Blueprint

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Signals:
    """Measured over the last seconds, of all replicas together."""

    now_s: float
    blueprint: Blueprint
    running: int
    waiting: int  # in engines and gateway
    backlog_tokens: int  # of prompts, accepted and not computed
    kv_use: float  # share of all blocks
    arrivals_s: float  # requests a second
    prompt_tokens: tuple[float, ...]  # uncached, by QUANTILES; empty before any request
    output_tokens: float  # mean of an answer
    ttft_ms: float | None = None  # p50; None where nothing was measured
    tbt_ms: float | None = None  # p50
    step_cost: tuple[float, ...] | None = None  # StepCost's first four, fitted to real steps
    pause_ms: float | None = None  # p50 of streams that went on at another replica

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "blueprint": self.blueprint.to_json()}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> "Signals":
        """Raises KeyError or TypeError for a record that is none."""
        fields = dict(found)
        fields["blueprint"] = Blueprint.of_json(fields["blueprint"])
        for name in ("prompt_tokens", "step_cost"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def at(self, now_s: float) -> "Signals":
        return replace(self, now_s=now_s)
