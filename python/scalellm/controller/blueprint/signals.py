"""What the policy sees of the load: one flat record, and the window that sums requests up to it."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scalellm.controller.blueprint.shape import Blueprint

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_RECENT = 128  # requests that lengths are taken from


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


class Window:
    """Requests of the last `span_s` seconds: how many came, how long they were, what they waited.

    Times are given by the caller; nothing here reads a clock."""

    def __init__(self, span_s: float = 20.0) -> None:
        self.span_s = span_s
        self._began_s: float | None = None
        self._arrived: deque[float] = deque()
        self._prompts: deque[int] = deque(maxlen=_RECENT)
        self._outputs: deque[int] = deque(maxlen=_RECENT)
        self._ttft: deque[tuple[float, float]] = deque()
        self._tbt: deque[tuple[float, float]] = deque()
        self._pauses: deque[tuple[float, float]] = deque()

    def arrived(self, now_s: float) -> None:
        self._began_s = now_s if self._began_s is None else self._began_s
        self._arrived.append(now_s)

    def started(self, now_s: float, ttft_ms: float, uncached_tokens: int) -> None:
        """A first token came; so many of its prompt's tokens had to be computed."""
        self._ttft.append((now_s, ttft_ms))
        self._prompts.append(uncached_tokens)

    def finished(self, now_s: float, output_tokens: int, tbt_ms: float | None) -> None:
        self._outputs.append(output_tokens)
        if tbt_ms is not None:
            self._tbt.append((now_s, tbt_ms))

    def went_on(self, now_s: float, pause_ms: float) -> None:
        """A stream that was moved got its next token."""
        self._pauses.append((now_s, pause_ms))

    def signals(
        self,
        now_s: float,
        blueprint: Blueprint,
        running: int,
        waiting: int,
        backlog_tokens: int,
        kv_use: float,
    ) -> Signals:
        for timed in (self._ttft, self._tbt, self._pauses):
            while timed and timed[0][0] < now_s - self.span_s:
                timed.popleft()
        while self._arrived and self._arrived[0] < now_s - self.span_s:
            self._arrived.popleft()
        began_s = now_s if self._began_s is None else self._began_s
        span_s = min(self.span_s, max(1.0, now_s - began_s))
        return Signals(
            now_s,
            blueprint,
            running,
            waiting,
            backlog_tokens,
            kv_use,
            arrivals_s=len(self._arrived) / span_s,
            prompt_tokens=quantiles(sorted(self._prompts)),
            output_tokens=sum(self._outputs) / len(self._outputs) if self._outputs else 0.0,
            ttft_ms=_median([value for _, value in self._ttft]),
            tbt_ms=_median([value for _, value in self._tbt]),
            pause_ms=_median([value for _, value in self._pauses]),
        )


def quantiles(ascending: Sequence[float]) -> tuple[float, ...]:
    if not ascending:
        return ()
    return tuple(float(ascending[int(share * len(ascending))]) for share in QUANTILES)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
