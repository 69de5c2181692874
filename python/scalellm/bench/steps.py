"""What a step of a real engine costs: a short sweep of loads, and the line through its steps.

The engine's own loop runs in this process on dummy requests; a step's time is the time from the end
of the step before to its own end while there is work, scheduling and handing over included. Steps
that follow each other with the same requests are summed up by their median, so that a moment in
which something else had the processor does not count.
"""

import queue
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scalellm.controller.blueprint.cost import StepCost
from scalellm.engine.step_time import StepShape, StepTime
from scalellm.errors import EngineError

if TYPE_CHECKING:
    from scalellm.config import EngineConfig
    from scalellm.engine.local import LocalEngine, Outbox
    from scalellm.engine.step import Limits
    from scalellm.executor.single import SingleExecutor

_RUN = 8  # equal steps that are one sample
_ANSWER_S = 600.0
_SEEDS = 1000  # of one sweep
_FREE_TOKENS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24)


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` requests at once."""

    streams: int
    prompt_tokens: int
    output_tokens: int


# Streams join one by one while prompts last, so many streams at once need short ones.
SWEEP = (
    Load(1, 32, 24),
    Load(1, 512, 16),
    Load(4, 128, 16),
    Load(4, 640, 12),
    Load(8, 64, 16),
    Load(16, 16, 24),
    Load(16, 64, 32),
    Load(32, 16, 24),
    Load(32, 128, 48),
    Load(64, 8, 16),
)
SHORT_SWEEP = (
    Load(1, 32, 17),
    Load(1, 384, 9),
    Load(4, 96, 9),
    Load(12, 64, 9),
    Load(16, 16, 9),
    Load(32, 16, 17),
    Load(64, 8, 9),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Some equal steps."""

    tokens: float
    attended: float
    sequences: float
    read: float
    step_ms: float


class Recorder(StepTime):
    """The engine's own prediction, which also keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[float, StepShape, float]] = []  # ended at s, shape, computed in ms

    def observe(self, shape: StepShape, elapsed_ms: float) -> None:
        super().observe(shape, elapsed_ms)
        self.steps.append((time.perf_counter(), shape, elapsed_ms))


@dataclass(frozen=True, slots=True)
class MeasuredEngine:
    """An engine in this process whose steps are recorded."""

    engine: "LocalEngine"
    executor: "SingleExecutor"
    limits: "Limits"
    recorder: Recorder


@contextmanager
def measured_engine(config: "EngineConfig") -> Iterator[MeasuredEngine]:
    """Raises OutOfMemoryError where there is no place for the model."""
    from scalellm.engine.local import LocalEngine, LocalListener
    from scalellm.engine.loop import EngineLoop
    from scalellm.executor.load import load_executor

    executor = load_executor(config)
    listener = LocalListener()
    loop = EngineLoop(executor, listener, config)
    recorder = Recorder()
    loop.scheduler.step_time = recorder
    engine = LocalEngine(loop, listener, executor.close)
    try:
        yield MeasuredEngine(engine, executor, loop.scheduler.limits, recorder)
    finally:
        engine.close()


def run_sweep(measured: MeasuredEngine, sweep: Sequence[Load], number: int) -> list[Sample]:
    """What the steps of a sweep took. `number` is another one for each sweep of an engine, whose
    prompts would otherwise be those that its cache has."""
    measured.recorder.steps.clear()
    for seed, load in enumerate(sweep, start=number * _SEEDS):
        run_load(measured.engine, load, measured.executor.vocab_size, seed)
    return list(samples_of(measured.recorder.steps))


def run_load(engine: "LocalEngine", load: Load, vocab_size: int, seed: int) -> None:
    """All requests of a load, to their ends. Raises EngineError if one fails."""
    from scalellm.engine.local import LocalSubmission

    random = np.random.default_rng(seed)
    outbox: Outbox = queue.SimpleQueue()
    submissions = [
        LocalSubmission(
            engine.listener.next_key(),
            random.integers(0, vocab_size, load.prompt_tokens).tolist(),
            load.output_tokens,
            seed=at,
            ignore_eos=True,
            temperature=0.0,
        )
        for at in range(load.streams)
    ]
    engine.listener.submit(submissions, outbox)
    left = load.streams
    while left:
        output = outbox.get(timeout=_ANSWER_S)
        if output is None or output[2] == "error":
            raise EngineError(f"a step of the sweep failed: {output and output[-1]}")
        left -= output[2] is not None


def samples_of(steps: Sequence[tuple[float, StepShape, float]]) -> Iterator[Sample]:
    """Medians of runs of equal steps; a step after a pause counts by its computation alone."""
    run: list[tuple[StepShape, float]] = []
    last_s = 0.0
    for ended_s, shape, elapsed_ms in steps:
        period_ms = 1e3 * (ended_s - last_s)
        last_s = ended_s
        taken_ms = period_ms if period_ms < 1.5 * elapsed_ms + 5.0 else elapsed_ms
        if run and (run[0][0].tokens, run[0][0].spans) != (shape.tokens, shape.spans):
            yield _median(run)
            run = []
        run.append((shape, taken_ms))
        if len(run) == _RUN:
            yield _median(run)
            run = []
    if run:
        yield _median(run)


def _median(run: Sequence[tuple[StepShape, float]]) -> Sample:
    return Sample(
        statistics.fmean(shape.tokens for shape, _ in run),
        statistics.fmean(shape.attended for shape, _ in run),
        statistics.fmean(shape.spans for shape, _ in run),
        statistics.fmean(shape.read for shape, _ in run),
        statistics.median(taken for _, taken in run),
    )


def fit(samples: Sequence[Sample]) -> StepCost:
    """Least squares of relative errors, for the number of free tokens with which they are least.

    So many can be free only if computing them takes no longer than a step takes at least."""
    costs = [_fit(samples, free_tokens) for free_tokens in _FREE_TOKENS]
    costs = [cost for cost in costs if cost.base_ms >= cost.per_token_ms * cost.free_tokens]
    return min(costs, key=lambda cost: sum(error * error for error in _errors(cost, samples)))


def _fit(samples: Sequence[Sample], free_tokens: int) -> StepCost:
    """No coefficient is below 0: those that would be are left out, the most negative first."""
    rows = np.array(
        [[1.0, max(0.0, s.tokens - free_tokens), s.attended, s.sequences, s.read] for s in samples]
    )
    times = np.array([s.step_ms for s in samples])
    rows, ones = rows / times[:, None], np.ones(len(times))
    kept = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while kept:
        part = np.linalg.lstsq(rows[:, kept], ones, rcond=None)[0]
        if part.min() >= 0:
            found[kept] = part
            break
        kept.pop(int(part.argmin()))
    base_ms, token_ms, attended_ms, sequence_ms, read_ms = (float(value) for value in found)
    return StepCost(
        base_ms,
        token_ms,
        attended_ms,
        sequence_ms,
        per_read_ms=read_ms,
        free_tokens=free_tokens,
    )


def _errors(cost: StepCost, samples: Sequence[Sample]) -> list[float]:
    return [
        cost.step_ms(s.tokens, s.attended, s.sequences, s.read) / s.step_ms - 1 for s in samples
    ]


def slowed(cost: StepCost, samples: Sequence[Sample]) -> float:
    """How many times what the cost says the median step took."""
    return statistics.median(1 / (1 + error) for error in _errors(cost, samples))


def misfit(cost: StepCost, samples: Sequence[Sample]) -> float:
    """The median relative error of the cost over the samples."""
    return statistics.median(abs(error) for error in _errors(cost, samples))
