"""One generation request: what was asked, and how far it has come.

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^                  |                   ^
       `----preempt-------'                   |
       `------ cancel, deadline, error -------'

There is no prefill or decode phase: `num_computed_tokens` catches up with `num_tokens`, and a token
is sampled whenever it does.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from scalellm.engine.phases import PhaseTotals

GREEDY_BELOW = 1e-5  # temperatures below are zero: the most likely token is taken
FEW_LOGITS = 64  # so many can be found without writing the others

FinishReason = Literal["eos", "stop_token", "length", "cancelled", "deadline", "error"]


class Submitted(Protocol):
    """What a listener hands over; `scalellm._core.Submission` is one."""

    key: int
    trace_id: str
    prompt_ids: list[int]
    resume_ids: list[int]
    max_tokens: int
    min_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    priority: int
    deadline_us: int | None
    arrival_us: int
    choice: int
    cache_salt: bytes
    prompt_logprobs: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: list[tuple[int, float]]
    seed: int
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Defaults are plain sampling from the model's distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    choice: int = 0
    logprobs: int | None = None  # alternatives per output token; 0 gives the chosen token alone

    @property
    def penalised(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A request's whole state in the engine; the scheduler alone changes it."""

    key: int
    prompt_ids: Sequence[int]
    max_tokens: int  # output tokens, resumed ones included
    sampling: Sampling = Sampling()
    resume_ids: Sequence[int] = ()  # output of an earlier attempt
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()  # empty when they are to be ignored
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0  # lower is served first
    arrival_us: int = 0
    deadline_us: int | None = None
    cache_salt: bytes = b""
    prompt_logprobs: int | None = None
    trace_id: str = ""  # what the gateway calls it in its log and traces

    status: Status = field(default=Status.WAITING, init=False)
    token_ids: list[int] = field(init=False)  # prompt, then output
    num_prompt_tokens: int = field(init=False)
    is_plain: bool = field(init=False)  # logits are drawn from as they are, and not asked for
    num_computed_tokens: int = field(default=0, init=False)
    block_table: "array[int]" = field(default_factory=lambda: array("i"), init=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False)  # of full blocks
    num_cached_blocks: int = field(
        default=0, init=False
    )  # leading blocks known to the prefix cache
    uncached_tokens: int = field(default=0, init=False)  # to compute, when it was queued last
    reserved_blocks: int = field(default=0, init=False)  # still promised to a protected request
    prompt_logprobs_done: int = field(default=0, init=False)  # leading prompt positions answered
    cached_tokens: int = field(default=0, init=False)  # of the prompt, at the first admission
    abort: tuple[FinishReason, str | None] | None = field(default=None, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    queued_us: int = field(default=0, init=False)
    first_scheduled_us: int = field(default=0, init=False)
    first_token_us: int = field(default=0, init=False)
    finished_us: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    steps: int = field(default=0, init=False)
    phases_before: PhaseTotals | None = field(default=None, init=False)  # at first_scheduled_us
    phases_at_first: PhaseTotals | None = field(default=None, init=False)  # at first_token_us

    def __post_init__(self) -> None:
        self.token_ids = [*self.prompt_ids, *self.resume_ids]
        self.num_prompt_tokens = len(self.prompt_ids)
        sampling = self.sampling
        self.is_plain = (
            not sampling.penalised and not sampling.logit_bias and sampling.logprobs is None
        )

    @classmethod
    def from_submission(cls, given: Submitted, eos_token_ids: frozenset[int]) -> "Request":
        """Prompt logprobs of a resumed request went out with its first attempt: not asked again."""
        sampling = Sampling(
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            min_p=given.min_p,
            repetition_penalty=given.repetition_penalty,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            logit_bias=tuple(given.logit_bias),
            seed=given.seed,
            choice=given.choice,
            logprobs=given.logprobs,
        )
        resume_ids = given.resume_ids
        return cls(
            key=given.key,
            prompt_ids=given.prompt_ids,
            resume_ids=resume_ids,
            max_tokens=given.max_tokens,
            min_tokens=given.min_tokens,
            sampling=sampling,
            eos_token_ids=frozenset() if given.ignore_eos else eos_token_ids,
            stop_token_ids=frozenset(given.stop_token_ids),
            priority=given.priority,
            arrival_us=given.arrival_us,
            deadline_us=given.deadline_us,
            cache_salt=given.cache_salt,
            prompt_logprobs=None if resume_ids else given.prompt_logprobs,
            trace_id=given.trace_id,
        )

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """Who is served first: priority, then those with a client in the middle of an answer, then
        arrival; the key makes it total."""
        return (self.priority, not self.resume_ids, self.arrival_us, self.key)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def takes_largest_logit(self) -> bool:
        """Whether the next token is the one of the largest logit, and nothing else is asked of
        the logits."""
        return self.sampling.temperature < GREEDY_BELOW and self._takes_logits_as_they_are

    @property
    def takes_few_logits(self) -> bool:
        """Whether a few of the largest logits decide on the next token, and nothing else is asked
        of them."""
        sampling = self.sampling
        return (
            sampling.temperature < GREEDY_BELOW or 0 < sampling.top_k <= FEW_LOGITS
        ) and self._takes_logits_as_they_are

    @property
    def _takes_logits_as_they_are(self) -> bool:
        return (
            self.is_plain
            and (self.prompt_logprobs is None or not self.wants_prompt_logprobs)
            and (self.min_tokens == 0 or self.num_output_tokens >= self.min_tokens)
        )

    @property
    def wants_prompt_logprobs(self) -> bool:
        return (
            self.prompt_logprobs is not None
            and self.prompt_logprobs_done < self.num_prompt_tokens - 1
        )

    def finish_after_last(self, max_model_len: int) -> FinishReason | None:
        """Why generation ends with the last output token, if it does."""
        tokens = len(self.token_ids)
        output = tokens - self.num_prompt_tokens
        if output == 0:
            return None
        if output >= self.min_tokens:
            last = self.token_ids[-1]
            if last in self.eos_token_ids:
                return "eos"
            if last in self.stop_token_ids:
                return "stop_token"
        if output >= self.max_tokens or tokens >= max_model_len:
            return "length"
        return None
