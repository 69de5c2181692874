"""The engine's loop: takes requests from a listener, runs steps, hands results back.

    poll -> take in -> schedule -> worker computes; meanwhile: emit the last step, poll, take in
                ^                        |
                `-------- update <-------'

One thread owns scheduler and KV cache; it never waits for a client, and not for the model without
looking after the listener. It gives a sign of life at least every 200 ms, except when a step takes
so much longer than predicted that it must be taken for hung: then it falls silent, and whoever
watches the age of the last sign replaces the engine.
"""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from scalellm.config import EngineConfig
from scalellm.engine.calibration import REPEATS, Shape, build_batch, write_blocks
from scalellm.engine.hand_over import HandOver
from scalellm.engine.kv_cache import KVCache
from scalellm.engine.logprobs import TokenLogprobs
from scalellm.engine.phases import PhaseClock, PhaseTotals, phases_between
from scalellm.engine.request import FinishReason, Request
from scalellm.engine.sampler import Sampler
from scalellm.engine.scheduler import Scheduler
from scalellm.engine.step import Limits, Output, Step
from scalellm.engine.worker import Computed, Done, Executor, Worker, compute
from scalellm.errors import EngineError
from scalellm.executor.batch import Batch
from scalellm.executor.expert_use import ExpertUse, used_between

SIGN_OF_LIFE_S = 0.2
CPU_STEP_BUDGET_MS = 800.0
GPU_STEP_BUDGET_MS = 50.0
_LOOK_EVERY_S = 0.02  # while a step runs
_EMIT_EVERY_S = SIGN_OF_LIFE_S / 2
_HUNG_AFTER_S = 10.0  # or _HUNG_FACTOR times the prediction, whichever is more
_HUNG_FACTOR = 20.0
_HUNG_UNPREDICTED_S = 120.0
_MAX_FAILED_STEPS = 5  # in a row; then the engine is beyond help
WARM_UP_TOKENS = 64
_MAX_CALIBRATIONS = 16

Command = tuple[str, Any]
EmittedLogprobs = list[TokenLogprobs]

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Where requests come from and results go; `scalellm._core.EngineListener` is one."""

    def poll(self, timeout_s: float) -> list[Command]: ...
    def emit(self, outputs: Sequence[tuple[Any, ...]], load: tuple[Any, ...]) -> None: ...
    def emit_kv(
        self, stored: Sequence[tuple[bytes, bytes]], removed: Sequence[bytes], snapshot: bool
    ) -> None: ...
    def note_step(
        self,
        number: int,
        started_us: int,
        requests: int,
        tokens: int,
        phases: Sequence[tuple[str, int]],
        expert_use: ExpertUse | None,
    ) -> None: ...
    def answer_calibrate(self, ticket: int, step_ms: Sequence[float]) -> None: ...
    def drain(self) -> None: ...


def limits_of(config: EngineConfig, executor: Executor) -> Limits:
    """A step's bounds; a batch cannot have more requests than the step has tokens."""
    budget_ms = config.step_budget_ms
    if budget_ms is None:
        on_cpu = executor.device.type == "cpu"
        budget_ms = CPU_STEP_BUDGET_MS if on_cpu else GPU_STEP_BUDGET_MS
    return Limits(
        max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=executor.max_model_len,
        step_budget_ms=budget_ms,
        max_drafts=config.speculative_tokens if config.speculative == "ngram" else 0,
        max_preemptions=config.max_preemptions,
    )


class EngineLoop:
    """Serves one executor until it is stopped, or drained and empty."""

    def __init__(
        self,
        executor: Executor,
        listener: Listener,
        config: EngineConfig,
        *,
        drain_timeout_s: float = 30.0,
        after_step: Callable[[Scheduler], None] | None = None,
    ) -> None:
        """`after_step` is called between steps, for tests and tools that look inside."""
        self._executor = executor
        self._listener = listener
        self._eos_token_ids = frozenset(executor.model_config.eos_token_ids)
        self._drain_timeout_s = drain_timeout_s
        self._after_step = after_step
        kv = KVCache(executor.num_blocks, executor.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(limits_of(config, executor), kv)
        self._sampler = Sampler(executor.vocab_size)
        nice = config.compute_nice if executor.device.type == "cpu" else 0
        threads = executor.torch_threads or config.cpu_threads
        self._worker: Worker[Any] = Worker(threads, nice)
        self._logprobs: dict[int, list[TokenLogprobs]] = {}
        self._prompt_logprobs: dict[int, EmittedLogprobs] = {}
        self._calibrations: deque[tuple[int, list[Shape]]] = deque()
        self._drain_wanted = False
        self._stop_wanted = False
        self._hand_over_wanted = False
        self._hand_over: HandOver | None = None
        self._draining_since: float | None = None
        self._emitted_at = -math.inf
        self._clock = PhaseClock()
        self._phases: PhaseTotals = {}  # when the last step was computed
        self._steps = 0
        self._step_ms = 0.0
        self._overhead_ms = 0.0
        self._failed_in_a_row = 0

    def drain(self) -> None:
        """Refuse new requests, finish those there are, then end `run`. Safe in signal handlers."""
        self._drain_wanted = True

    def hand_over(self) -> None:
        """Drain, but give requests back at a pace, for other replicas. Safe in signal handlers."""
        self._hand_over_wanted = True
        self.drain()

    def stop(self) -> None:
        """Cancel everything and end `run`. Safe in signal handlers."""
        self._stop_wanted = True

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until the end; with `ready`, run each kind of step once before, and call it.

        Raises EngineError when the model cannot run, at once or any more, or when steps fail again
        and again."""
        try:
            with self._worker:
                if ready is not None:
                    self._warm_up()
                    ready()
                while self._turn():
                    pass
        finally:
            self.scheduler.abandon()
            self._end_all("cancelled", "the engine ended before the request was finished")

    def _turn(self) -> bool:
        """One step, or a wait for work; False when the loop is to end."""
        scheduler = self.scheduler
        began = time.perf_counter()
        self._executor.check()
        if self._control():
            return False
        self._clock.mark("between steps")
        before, now_us = self._clock.totals(), _now_us()
        step = scheduler.schedule(now_us)
        if not step.keys:
            return self._idle()
        requests = [scheduler.requests[key] for key in step.keys]
        for key in step.admitted:
            request = scheduler.requests[key]
            request.phases_before = request.phases_before or before
        used_before = self._executor.expert_use()
        self._clock.mark("schedule")
        done = self._compute(
            lambda: compute(self._executor, self._sampler, step, requests), step.predicted_ms
        )
        self._clock.mark_parts(done.result.phases_ms if done.result else {}, "hand over")
        self._phases, computed_us = self._clock.totals(), _now_us()
        self._finish_step(step, done, computed_us)
        self._clock.mark("update")
        self._step_ms = (time.perf_counter() - began) * 1e3
        self._overhead_ms = max(0.0, self._step_ms - done.elapsed_ms)
        phases = phases_between(before, self._clock.totals())
        used = used_between(used_before, self._executor.expert_use())
        count, tokens = len(step.keys), step.shape.tokens
        self._listener.note_step(self._steps, now_us, count, tokens, phases, used)
        self._take_in(self._listener.poll(0.0))
        return True

    def _warm_up(self) -> None:
        """First calls allocate and compile; no client shall wait for that."""
        scheduler = self.scheduler
        longest = min(scheduler.max_model_len, scheduler.limits.max_num_batched_tokens)
        for shape in (Shape(0, 0, min(WARM_UP_TOKENS, longest)), Shape(1, 0, 0)):
            built = build_batch(shape, scheduler.kv)
            if built is None:
                continue
            batch, blocks = built
            done = self._compute(partial(self._executor.forward, batch), 0.0)
            scheduler.kv.free(blocks)
            if done.error is not None:
                raise EngineError(f"the model cannot run: {done.error}") from done.error

    def _idle(self) -> bool:
        if self.scheduler.requests:
            raise EngineError("the scheduler has requests and gives none of them work")
        self._emit()
        if self._calibrations:
            self._calibrate(*self._calibrations.popleft())
            return True
        self._take_in(self._listener.poll(0.0 if self._draining_since else _EMIT_EVERY_S))
        return self._draining_since is None or bool(self.scheduler.requests)

    def _control(self) -> bool:
        """Act on drain and stop; True when the loop is to end at once."""
        if self._stop_wanted:
            self._listener.drain()
            self._end_all("cancelled", None)
            return True
        if self._drain_wanted and self._draining_since is None:
            self._draining_since = time.monotonic()
            self._listener.drain()
        if (
            self._draining_since is not None
            and time.monotonic() - self._draining_since > self._drain_timeout_s
        ):
            self._end_all("cancelled", None)
            return True
        if self._hand_over_wanted:
            self._give_back()
        return False

    def _give_back(self) -> None:
        now_s = time.monotonic()
        if self._hand_over is None:
            self._hand_over = HandOver(now_s)
            self.scheduler.admits = False
        for key in list(self._hand_over.due(self.scheduler, now_s)):
            self.scheduler.cancel(key, _now_us())

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        try:
            self._take_in(self._listener.poll(0.0))
        finally:
            self.scheduler.cancel_all(_now_us(), reason, error)
            self._emit()

    # ------------------------------------------------------------ a step

    def _compute(self, job: Callable[[], Any], predicted_ms: float) -> Done[Any]:
        """Run a job on the worker; meanwhile emit, take in, and give signs of life."""
        self._worker.start(job)
        started = time.monotonic()
        hung_after_s = max(_HUNG_AFTER_S, _HUNG_FACTOR * predicted_ms / 1e3)
        if predicted_ms <= 0.0:
            hung_after_s = _HUNG_UNPREDICTED_S
        self._emit()
        while True:
            done = self._worker.wait(_LOOK_EVERY_S)
            if done is not None:
                return done
            if time.monotonic() - started < hung_after_s:
                self._take_in(self._listener.poll(0.0))
                if time.monotonic() - self._emitted_at > _EMIT_EVERY_S:
                    self._emit()

    def _finish_step(self, step: Step, done: Done[Computed], now_us: int) -> None:
        scheduler = self.scheduler
        self._steps += 1
        if done.result is None:
            self._fail_step(step, done.error, now_us)
            return
        self._failed_in_a_row = 0
        scheduler.step_time.observe(step.shape, done.elapsed_ms)
        computed = done.result
        self._logprobs = computed.logprobs
        for key, entries in computed.prompt_logprobs.items():
            self._prompt_logprobs.setdefault(key, []).extend(entries)
        scheduler.update(step, computed.token_ids, now_us, computed.errors, computed.further)
        if self._after_step is not None:
            self._after_step(scheduler)

    def _fail_step(self, step: Step, error: BaseException | None, now_us: int) -> None:
        self._failed_in_a_row += 1
        requests = (self.scheduler.requests.get(key) for key in step.keys)
        traces = ", ".join(sorted({found.trace_id for found in requests if found is not None}))
        logger.error("step %d failed, of requests %s", self._steps, traces, exc_info=error)
        self._executor.check()  # what can compute no more is given up, not failed
        self._sampler = Sampler(self._executor.vocab_size)
        reason = f"the engine could not compute a step: {type(error).__name__}: {error}"
        self.scheduler.fail(step, reason, now_us)
        if self._failed_in_a_row >= _MAX_FAILED_STEPS:
            raise EngineError(f"{_MAX_FAILED_STEPS} steps in a row failed; the last: {error}")

    # ------------------------------------------------------------ in

    def _take_in(self, commands: Sequence[Command]) -> None:
        scheduler = self.scheduler
        for name, value in commands:
            if name == "submit":
                request = Request.from_submission(value, self._eos_token_ids)
                scheduler.add(request, _now_us())
            elif name == "cancel":
                scheduler.cancel(value, _now_us())
            elif name == "drain":
                self.drain()
            elif name == "stop":
                self.stop()
            elif name == "kv_snapshot":
                self._emit_kv()
                self._listener.emit_kv(scheduler.kv.snapshot(), [], True)
            elif name == "calibrate":
                ticket, shapes = value
                if len(self._calibrations) < _MAX_CALIBRATIONS:
                    self._calibrations.append((ticket, [Shape(*shape) for shape in shapes]))
                else:
                    self._listener.answer_calibrate(ticket, [math.nan] * len(shapes))

    def _calibrate(self, ticket: int, shapes: Sequence[Shape]) -> None:
        """Time each shape on the idle engine; nan for one that does not fit it."""
        times_ms = []
        for shape in shapes:
            times_ms.append(self._time_shape(shape))
            if self._stop_wanted:
                break
        times_ms += [math.nan] * (len(shapes) - len(times_ms))
        self._listener.answer_calibrate(ticket, times_ms)

    def _time_shape(self, shape: Shape) -> float:
        scheduler = self.scheduler
        limits = scheduler.limits
        if (
            shape.decode_seqs > limits.max_num_seqs
            or shape.decode_seqs + shape.prefill_tokens > limits.max_num_batched_tokens
            or max(shape.context_tokens + 1, shape.prefill_tokens) > scheduler.max_model_len
        ):
            return math.nan
        built = build_batch(shape, scheduler.kv)
        if built is None:
            return math.nan
        batch, blocks = built
        elapsed: list[float] = []
        writes = write_blocks(blocks, limits.max_num_batched_tokens)
        for step in (*writes, *[batch] * (1 + REPEATS)):
            done = self._compute(partial(_choose, self._executor, step), 0.0)
            if done.error is not None:
                logger.error("calibrating %s failed", shape, exc_info=done.error)
                elapsed.clear()
                break
            elapsed.append(done.elapsed_ms)
        scheduler.kv.free(blocks)
        return statistics.median(elapsed[-REPEATS:]) if elapsed else math.nan

    # ------------------------------------------------------------ out

    def _emit(self) -> None:
        """Hand over what happened since the last call, and the load."""
        scheduler = self.scheduler
        outputs = [self._wire_output(output) for output in scheduler.take_outputs()]
        kv = scheduler.kv
        load = (
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.backlog_tokens,
            kv.num_used,
            kv.num_blocks,
            self._step_ms,
            self._overhead_ms,
            self._steps,
            scheduler.num_preemptions,
            (scheduler.prefix_hit_tokens, scheduler.prefix_query_tokens),
            (scheduler.num_drafts, scheduler.num_right_drafts),
            (scheduler.step_time.coefficients, self._executor.expert_use()),
        )
        self._listener.emit(outputs, load)
        self._emit_kv()
        self._emitted_at = time.monotonic()

    def _emit_kv(self) -> None:
        stored, removed = self.scheduler.kv.take_events()
        if stored or removed:
            self._listener.emit_kv(stored, removed, False)

    def _wire_output(self, output: Output) -> tuple[Any, ...]:
        """As `EngineListener.emit` describes it."""
        request = output.request
        key = request.key
        finished = output.finish_reason is not None
        emitted_before = request.num_output_tokens - len(request.resume_ids) - len(output.token_ids)
        first = emitted_before == 0
        logprobs: EmittedLogprobs | None = None
        if output.token_ids and request.sampling.logprobs is not None:
            logprobs = [*self._logprobs[key][: len(output.token_ids)]]
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if first and request.prompt_logprobs is not None and output.token_ids:
            prompt_logprobs = [None, *self._prompt_logprobs.get(key, ())]
        if first or finished:
            self._prompt_logprobs.pop(key, None)
        times: tuple[Any, ...] | None = None
        if first:
            request.phases_at_first = self._phases
        if first or finished:
            times = (
                request.queued_us,
                request.first_scheduled_us,
                request.first_token_us,
                request.finished_us,
                request.preemptions,
                request.steps,
                phases_between(request.phases_before, request.phases_at_first or self._phases),
                phases_between(request.phases_at_first, self._phases) if finished else [],
            )
        if finished:
            self._sampler.forget(key)
        return (
            key,
            list(output.token_ids),
            output.finish_reason,
            request.cached_tokens,
            logprobs,
            prompt_logprobs,
            times,
            output.stop_token_id,
            output.error,
        )


def _choose(executor: Executor, batch: Batch) -> list[int | None]:
    """Compute a batch to its most likely ids."""
    ids = executor.greedy(batch)
    return list(executor.forward(batch).argmax(-1).tolist()) if ids is None else ids


def _now_us() -> int:
    return time.time_ns() // 1000
