"""The values that scheduling is about: a step's bounds, its work, and what came of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from scalellm.engine.request import FinishReason, Request
from scalellm.engine.step_time import StepShape, StepTime
from scalellm.executor.batch import Span

PROMPT_LOGITS_PER_STEP = 128  # rows for prompt logprobs, each vocabulary-wide in float32
DRAFTS_PER_STEP = 128  # rows of as many numbers, where a token is not only the largest logit's


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    step_budget_ms: float  # predicted; of a step without running streams
    max_drafts: int = 0  # ids guessed for a request in a step; 0 without speculation
    max_preemptions: int = 3
    max_waiting: int = 16384

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; must be at least "
                f"max_num_seqs, {self.max_num_seqs}, so that every running request advances"
            )


@dataclass(frozen=True, slots=True)
class Step:
    """One step's work, a value: `keys[i]` names the request that `spans[i]` belongs to."""

    keys: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    admitted: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    shape: StepShape = field(default_factory=StepShape)
    predicted_ms: float = 0.0


class Output(NamedTuple):
    """What happened to one request since it was last reported."""

    request: Request
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None


class Plan:
    """A step in the making."""

    def __init__(self, tokens_left: int) -> None:
        self.tokens_left = tokens_left
        self.budget_ms = math.inf  # of the whole step, once its streams are known
        self.num_chunks = 0
        self.prompt_logits_left = PROMPT_LOGITS_PER_STEP
        self.drafts_left = DRAFTS_PER_STEP
        self.keys: list[int] = []
        self.spans: list[Span] = []
        self.admitted: list[int] = []
        self.preempted: list[int] = []
        self._attended = 0.0
        self._read = 0.0
        self._tokens = 0

    @property
    def shape(self) -> StepShape:
        return StepShape(self._tokens, self._attended, len(self.spans), self._read)

    def append(
        self, request: Request, tokens: int, now_us: int, drafts: Sequence[int] = ()
    ) -> None:
        """Compute `tokens` of a request, and `drafts` if these reach its end."""
        token_ids = request.token_ids
        start = request.num_computed_tokens
        end = start + tokens
        num_logits = 1 if end == len(token_ids) else 0
        if request.prompt_logprobs is not None and request.wants_prompt_logprobs:
            first = max(start, request.prompt_logprobs_done)
            if first < min(end, request.num_prompt_tokens - 1):
                num_logits = end - first
                self.prompt_logits_left -= num_logits
        if request.first_scheduled_us == 0:
            request.first_scheduled_us = now_us
        ids = (token_ids[start],) if tokens == 1 else tuple(token_ids[start:end])
        self.keys.append(request.key)
        last = len(token_ids) - request.num_prompt_tokens + 1 >= request.max_tokens
        if drafts:
            ids, tokens = (*ids, *drafts), tokens + len(drafts)
            num_logits += len(drafts)
            self.drafts_left -= len(drafts)
        self.spans.append(Span(ids, start, request.block_table[:], num_logits, last, len(drafts)))
        self.tokens_left -= tokens
        self._tokens += tokens
        self._attended += tokens * start + tokens * (tokens + 1) / 2
        self._read += start + tokens

    def step(self, step_time: StepTime) -> Step:
        shape = self.shape
        return Step(
            tuple(self.keys),
            tuple(self.spans),
            tuple(self.admitted),
            tuple(self.preempted),
            shape,
            step_time.predict_ms(shape),
        )
