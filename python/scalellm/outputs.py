"""What the Python API returns."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's share of the model's distribution at one position."""

    logprob: float
    rank: int  # 1 is the most likely
    decoded_token: str


PositionLogprobs = dict[int, Logprob]  # by token id: the token itself and the most likely ones


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Unix microseconds, and how the request fared; 0 for what never happened."""

    queued_us: int
    first_scheduled_us: int
    first_token_us: int
    finished_us: int
    preemptions: int
    steps: int


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of `n` answers to a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]  # with the end-of-sequence or stop token that ended it
    finish_reason: str  # "stop", "length", or "error" with `error`
    stop_reason: int | str | None = None  # the stop token id or stop string
    logprobs: tuple[PositionLogprobs, ...] | None = None
    error: str | None = None
    times: RequestTimes | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its answers."""

    prompt: str | None  # None when token ids were given
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None  # the first is None
    cached_tokens: int = 0  # of the prompt, from the prefix cache
