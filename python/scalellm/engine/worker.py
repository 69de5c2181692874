"""The thread that computes: forward pass and sampling of one step at a time.

    loop thread     schedule N |         | emit N-1, take in | ... | update N | schedule N+1 | ...
    worker thread              | prepare | forward, sample N       |

Kernels run without the GIL, so the loop thread's work hides behind them. It only begins when they
have: whoever holds the GIL keeps it for 5 ms, and prepare would wait for what can wait itself.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from scalellm.engine.logprobs import TokenLogprobs, token_logprobs
from scalellm.engine.request import Request
from scalellm.engine.sampler import Sampled, Sampler
from scalellm.engine.step import Step
from scalellm.executor.batch import Batch
from scalellm.executor.expert_use import ExpertUse

Result = TypeVar("Result")


class ModelFacts(Protocol):
    """What the engine wants to know of a model; `scalellm.models.config.ModelConfig` has it."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class Executor(Protocol):
    """What computes batches; `scalellm.executor.single.SingleExecutor` is one."""

    max_model_len: int
    device: torch.device

    @property
    def model_config(self) -> ModelFacts: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def last_forward_ms(self) -> Mapping[str, float]:
        """Of the last forward pass, by kind of operation, as far as it is known; `prepare` is the
        making of its inputs. Read once the pass has ended, on a GPU too."""

    @property
    def torch_threads(self) -> int | None:
        """How many threads torch may use where steps are computed; None for as many as it likes."""

    def check(self) -> None:
        """Raises EngineError once steps can no longer be computed, whatever they are."""

    def expert_use(self) -> ExpertUse | None:
        """How experts were used, as last looked at; None for a model without any."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 [sum of num_logits, vocab_size]; the next call may write over them."""

    def greedy(self, batch: Batch) -> list[int | None] | None:
        """As `forward`, to the lowest id of each row's largest logit, None where that is not
        finite. None, and nothing is computed, where logits have to be written for it."""

    def draw(self, batch: Batch, draws: npt.NDArray[np.void]) -> list[int | None] | None:
        """As `forward`, to an id of each row as `draws` (of `scalellm.kernels.sampling.DRAW`) say,
        each of temperature 0 or with a top_k of at most FEW_LOGITS, None where logits are not
        finite. None, and nothing is computed, where logits have to be written for it."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A step's results; the dicts are by request key."""

    token_ids: list[int | None]  # for each span of the step; None where nothing is sampled
    further: dict[int, tuple[int, ...]] = field(default_factory=dict)  # after drafts that are right
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # of all these ids
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    phases_ms: dict[str, float] = field(default_factory=dict)  # one after the other


def compute(
    executor: Executor, sampler: Sampler, step: Step, requests: Sequence[Request]
) -> Computed:
    """Run one step; `requests[i]` is what `step.spans[i]` belongs to."""
    with torch.inference_mode():
        began = time.perf_counter()
        batch = Batch(step.spans)
        asked = _Asked(step, requests)
        drawn = None
        if asked.largest_only:
            drawn = executor.greedy(batch)
        elif asked.few_only:
            of_rows = [requests[i] for i in asked.sampling]
            drawn = executor.draw(batch, sampler.draws(of_rows, asked.before, executor.device))
        logits = executor.forward(batch) if drawn is None else None
        forward_ms = (time.perf_counter() - began) * 1e3
        sampled = Sampled.of(drawn or [])
        if logits is not None and asked.rows:
            chosen = logits if len(asked.rows) == len(logits) else logits[asked.rows]
            sampled = sampler.sample(chosen, [requests[i] for i in asked.sampling], asked.before)
        found = _accepted(step, asked, sampled)
        if logits is not None:
            for i, rows_of_prompt in asked.prompt_rows.items():
                span = step.spans[i]
                found.prompt_logprobs[step.keys[i]] = _prompt_logprobs(
                    logits, rows_of_prompt, span.start + len(span.token_ids), requests[i]
                )
        all_ms = (time.perf_counter() - began) * 1e3
        found.phases_ms.update(_phases_ms(executor.last_forward_ms, forward_ms, all_ms))
        return found


class _Asked:
    """What a step's spans ask of its logits."""

    def __init__(self, step: Step, requests: Sequence[Request]) -> None:
        # A row for each span that reaches the end of its sequence, and for each of its drafts:
        self.sampling: list[int] = []  # the span
        self.rows: list[int] = []  # of the logits
        self.before: list[Sequence[int]] = []  # the drafts before it
        self.prompt_rows: dict[int, range] = {}  # span -> rows for prompt logprobs
        self.has_drafts = False
        self.largest_only = True  # nothing but the ids of the largest logits
        self.few_only = True  # no more than draws from a few of the largest
        end_row = 0
        for i, (span, request) in enumerate(zip(step.spans, requests, strict=True)):
            token_ids, start, _, num_logits, _, drafts = span
            if not num_logits:
                continue
            first_row = end_row
            end_row += num_logits
            if start + len(token_ids) - drafts == len(request.token_ids):
                self.sampling.append(i)
                self.rows.append(end_row - 1 - drafts)
                self.before.append(())
                for count in range(1, drafts + 1):
                    self.has_drafts = True
                    self.sampling.append(i)
                    self.rows.append(end_row - 1 - drafts + count)
                    self.before.append(token_ids[1 : 1 + count])
            if num_logits > 1 + drafts or (
                request.prompt_logprobs is not None and request.wants_prompt_logprobs
            ):
                self.prompt_rows[i] = range(first_row, end_row)
            if self.few_only and not request.takes_largest_logit:
                self.largest_only = False
                self.few_only = request.takes_few_logits


def _accepted(step: Step, asked: _Asked, sampled: Sampled) -> Computed:
    """What was sampled for each span: its first id, and those that follow drafts that are right.

    A row after drafts that has no token only ends them: if it comes to it, the next step says so.
    """
    found = Computed([None] * len(step.spans))
    if not (asked.has_drafts or sampled.errors or sampled.logprobs):
        for i, token_id in zip(asked.sampling, sampled.token_ids, strict=True):
            found.token_ids[i] = token_id
        return found
    row = 0
    while row < len(asked.sampling):
        i = asked.sampling[row]
        key, span = step.keys[i], step.spans[i]
        first, row = row, row + 1 + span.num_drafts
        found.token_ids[i] = sampled.token_ids[first]
        if error := sampled.errors.get(first):
            found.errors[key] = error
        count = 1
        if span.num_drafts:
            ids = sampled.token_ids[first:row]
            drafts = span.token_ids[-span.num_drafts :]
            for drawn, draft, after in zip(ids, drafts, ids[1:], strict=False):
                if drawn != draft or after is None:
                    break
                count += 1
            found.further[key] = tuple(i for i in ids[1:count] if i is not None)
        if sampled.logprobs and first in sampled.logprobs:
            found.logprobs[key] = [sampled.logprobs[first + n] for n in range(count)]
    return found


def _phases_ms(by_kind: Mapping[str, float], forward_ms: float, all_ms: float) -> dict[str, float]:
    """The phases of a step's computation.

    On a GPU `forward` returns before its work is done; then the kinds' sum tells how long it was.
    """
    phases = {"prepare": by_kind.get("prepare", 0.0)}
    phases |= {f"forward/{kind}": ms for kind, ms in by_kind.items() if kind != "prepare"}
    known_ms = sum(phases.values())
    forward_ms = min(max(forward_ms, known_ms), all_ms)
    phases["forward"] = max(0.0, forward_ms - known_ms)
    phases["sample"] = all_ms - forward_ms
    return phases


def _prompt_logprobs(
    logits: torch.Tensor, rows: range, end: int, request: Request
) -> list[TokenLogprobs]:
    """Of the prompt ids that follow the positions of `rows`, the last of which is end - 1."""
    first = end - len(rows)
    count = min(len(rows), request.num_prompt_tokens - 1 - first)
    if count <= 0:
        return []
    targets = list(request.prompt_ids[first + 1 : first + 1 + count])
    alternatives = [request.prompt_logprobs or 0] * count
    return token_logprobs(logits[rows.start : rows.start + count], targets, alternatives)


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """A finished job: its result or what it raised."""

    elapsed_ms: float
    result: Result | None = None
    error: BaseException | None = None


class Worker(Generic[Result]):
    """One thread and one job at a time. A context manager: leaving it joins the thread."""

    def __init__(self, num_threads: int | None = None, nice: int = 0) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], Result] | None] = queue.SimpleQueue()
        self._taken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done[Result]] = queue.SimpleQueue()
        self._num_threads = num_threads
        self._nice = nice
        self._thread = threading.Thread(target=self._run, name="scalellm-step", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jobs.put(None)
        self._thread.join()

    def start(self, job: Callable[[], Result]) -> None:
        """Returns when the job runs, and most likely has come to what needs no GIL."""
        self._jobs.put(job)
        self._taken.get()

    def wait(self, timeout_s: float) -> Done[Result] | None:
        """The finished job, None if it still runs after `timeout_s`."""
        try:
            return self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _run(self) -> None:
        if self._nice:
            lower_priority(self._nice)
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        while (job := self._jobs.get()) is not None:
            self._taken.put(None)  # whom it wakes has to wait for the GIL
            started = time.perf_counter()
            result: Result | None = None
            error: BaseException | None = None
            try:
                result = job()
            except BaseException as raised:  # a panic of the kernels is no Exception
                error = raised
            self._done.put(Done((time.perf_counter() - started) * 1e3, result, error))


def lower_priority(nice: int) -> None:
    """Make the calling thread, and those that it starts, give way to the process's others.

    On Linux niceness belongs to the thread; elsewhere nothing is done."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
