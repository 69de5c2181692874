"""What a bench run sends, and its form for the load generator (crates/load-generator, plan.rs)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scalellm.bench.lengths import Fixed
from scalellm.bench.shapes import Prompt
from scalellm.bench.sources import Source, Synthetic
from scalellm.bench.target import PUBLIC_AUTHORITIES, Trust
from scalellm.errors import ConfigError

Endpoint = Literal["chat", "completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")
# Arrivals that are not drawn for the level: each client's own, or those of a trace.
CLIENTS, TRACE = "clients", "trace"
# Different prompts kept for one level; a longer level sends them again, and says so.
MAX_PROMPTS = 20_000
# Tokens of all a level's different prompts; bounds the bench's memory (about 6 bytes each, twice).
MAX_PROMPT_TOKENS = 20_000_000
_MAX_DEFAULT_WARMUP = 16
_MIN_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class Level:
    """One row: a closed loop of `concurrency` clients, or an open loop of `rate` requests a second.

    No request is sent after `requests` of them or after `duration_s`, whichever comes first. The
    clients of a closed loop begin evenly over `ramp_s`.
    """

    concurrency: int | None = None
    rate: float | None = None
    arrivals: str = "poisson"
    requests: int | None = None
    duration_s: float | None = None
    warmup: int = 0
    ramp_s: float = 0.0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("a level is either a concurrency or a rate")
        if self.requests is None and self.duration_s is None:
            raise ConfigError("a level needs a number of requests or a duration")

    @property
    def label(self) -> str:
        return f"{self.concurrency}" if self.rate is None else f"{self.rate:g}/s"

    def prompts_wanted(self) -> int:
        """Different prompts that a closed loop can use, bounded; a duration's number is a guess."""
        wanted = (self.concurrency or 1) * 64 if self.requests is None else self.requests
        return min(wanted, MAX_PROMPTS)


def closed_level(
    concurrency: int,
    rounds: int,
    requests: int | None,
    duration_s: float | None,
    warmup: int | None,
    ramp_s: float = 0.0,
) -> Level:
    """A closed-loop level; by default `rounds` requests for each client, and at least eight."""
    if requests is None and duration_s is None:
        requests = max(concurrency * rounds, _MIN_REQUESTS)
    if warmup is None:
        warmup = min(concurrency, _MAX_DEFAULT_WARMUP)
    return Level(
        concurrency, requests=requests, duration_s=duration_s, warmup=warmup, ramp_s=ramp_s
    )


def open_level(
    rate: float, arrivals: str, requests: int | None, duration_s: float | None, warmup: int | None
) -> Level:
    """An open-loop level; by default it lasts half a minute."""
    if requests is None and duration_s is None:
        duration_s = 30.0
    if warmup is None:
        warmup = max(1, min(round(rate), _MAX_DEFAULT_WARMUP))
    return Level(
        rate=rate, arrivals=arrivals, requests=requests, duration_s=duration_s, warmup=warmup
    )


@dataclass(frozen=True, slots=True)
class Client:
    """One of several kinds of users whose sum is the load; `rate` in requests per second."""

    name: str
    rate: float
    arrivals: str
    source: Source


@dataclass(frozen=True, slots=True)
class Workload:
    """What the requests of a run ask for: `source`, or else fixed lengths; or several clients."""

    endpoint: Endpoint = "completions"
    input_tokens: int = 128
    output_tokens: int = 64
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 60.0
    seed: int = 0
    record_gaps: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    clients: tuple[Client, ...] = ()

    @property
    def requests(self) -> Source:
        if self.source is not None:
            return self.source
        return Synthetic(Fixed(self.input_tokens), Fixed(self.output_tokens))

    def plan_json(
        self,
        level: Level,
        send_at_s: Sequence[float] | None,
        prompts: Sequence[Prompt],
        url: str,
        model: str,
        api_key: str,
        return_token_ids: bool,
        trust: Trust = PUBLIC_AUTHORITIES,
        trace_prefix: str | None = None,
    ) -> str:
        """The load generator's plan for one level; `send_at_s` where it is an open loop."""
        return json.dumps(
            {
                "url": url,
                "endpoint": self.endpoint,
                "model": model,
                "api_key": api_key or None,
                "tls": trust.plan_fields(),
                "trace_prefix": trace_prefix,
                "stream": self.stream,
                "return_token_ids": return_token_ids and self.stream,
                "max_tokens": self.output_tokens,
                "ignore_eos": self.ignore_eos,
                "temperature": self.temperature,
                "extra_body": dict(self.extra_body),
                "timeout_s": self.timeout_s,
                "record_gaps": self.record_gaps,
                "prompts": [prompt.fields() for prompt in prompts],
                "levels": [
                    {
                        "concurrency": level.concurrency,
                        "rate": level.rate,
                        "send_at_s": send_at_s,
                        "requests": level.requests,
                        "duration_s": level.duration_s,
                        "warmup": level.warmup,
                        "ramp_s": level.ramp_s,
                    }
                ],
            }
        )
