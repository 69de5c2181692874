"""Tokens a second of the Python API: all prompts given at once, no server, no text.

    output tok/s = output tokens / seconds          total tok/s = (prompt + output tokens) / seconds

of one call of `LLM.generate`; each repeat has prompts of its own, so that no prefix is found again.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from scalellm.bench.machine import describe_machine
from scalellm.errors import ConfigError, EngineError
from scalellm.outputs import RequestOutput
from scalellm.sampling_params import SamplingParams

SCHEMA = 1
_WARMUP_PROMPTS = 2
_WARMUP_TOKENS = 4


class Generates(Protocol):
    """What is measured; `scalellm.LLM` is one."""

    @property
    def max_model_len(self) -> int: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: SamplingParams, use_tqdm: bool
    ) -> list[RequestOutput]: ...


@dataclass(frozen=True, slots=True)
class Options:
    """Every prompt has `input_len` tokens, ids below `vocab_size`, every answer `output_len`."""

    input_len: int
    output_len: int
    num_prompts: int
    repeats: int
    vocab_size: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Repeat:
    """One call."""

    elapsed_s: float
    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def output_tok_s(self) -> float:
        return self.output_tokens / self.elapsed_s

    @property
    def total_tok_s(self) -> float:
        return (self.input_tokens + self.output_tokens) / self.elapsed_s

    @property
    def requests_s(self) -> float:
        return self.requests / self.elapsed_s


@dataclass(frozen=True, slots=True)
class Spread:
    """Of all repeats."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:,.1f} ({self.lowest:,.1f} to {self.highest:,.1f})"


@dataclass(frozen=True, slots=True)
class OfflineResult:
    started: str  # UTC, ISO 8601
    machine: Mapping[str, Any]
    options: Options
    repeats: tuple[Repeat, ...]
    interrupted: bool

    def spread(self, rate: str) -> Spread:
        """`rate`: "output_tok_s", "total_tok_s" or "requests_s"."""
        rates = [getattr(repeat, rate) for repeat in self.repeats]
        return Spread(statistics.median(rates), min(rates), max(rates))

    def to_json(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings`: what the engine ran with."""
        rates = ("output_tok_s", "total_tok_s", "requests_s")
        return {
            "schema": SCHEMA,
            "started": self.started,
            "machine": dict(self.machine),
            "settings": dict(settings),
            "workload": asdict(self.options),
            "interrupted": self.interrupted,
            **({name: asdict(self.spread(name)) for name in rates} if self.repeats else {}),
            "rows": [
                asdict(one) | {name: getattr(one, name) for name in rates} for one in self.repeats
            ],
        }


def run_offline(llm: Generates, options: Options, say: Callable[[Repeat], None]) -> OfflineResult:
    """Warm up, then measure `options.repeats` calls; Ctrl-C ends it with what there is.

    Raises ConfigError for lengths that the model does not take, EngineError for answers that fail.
    """
    if options.input_len + options.output_len > llm.max_model_len:
        raise ConfigError(
            f"--input-len and --output-len: got {options.input_len} and {options.output_len}, "
            f"allowed: {llm.max_model_len} tokens together"
        )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    repeats: list[Repeat] = []
    interrupted = False
    try:
        warm_up = prompts_of(options, repeat=-1)[:_WARMUP_PROMPTS]
        llm.generate(warm_up, _params(min(_WARMUP_TOKENS, options.output_len)), use_tqdm=False)
        for index in range(options.repeats):
            repeats.append(_measure(llm, options, index))
            say(repeats[-1])
    except KeyboardInterrupt:
        interrupted = True
    return OfflineResult(started, machine, options, tuple(repeats), interrupted)


def prompts_of(options: Options, repeat: int) -> list[list[int]]:
    """Random ids, the same for equal options and repeat."""
    rng = random.Random(f"{options.seed} {repeat}")
    return [
        [rng.randrange(options.vocab_size) for _ in range(options.input_len)]
        for _ in range(options.num_prompts)
    ]


def _params(output_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)


def _measure(llm: Generates, options: Options, index: int) -> Repeat:
    prompts = prompts_of(options, index)
    began = time.perf_counter()
    answers = llm.generate(prompts, _params(options.output_len), use_tqdm=False)
    elapsed_s = time.perf_counter() - began
    if failed := [one.outputs[0].error for one in answers if one.outputs[0].error is not None]:
        raise EngineError(f"{len(failed)} of {len(answers)} requests failed, e.g. {failed[0]}")
    return Repeat(
        elapsed_s=elapsed_s,
        requests=len(answers),
        input_tokens=sum(len(prompt) for prompt in prompts),
        output_tokens=sum(len(one.outputs[0].token_ids) for one in answers),
    )
