"""One replica: the engine's scheduler and cache, and a clock where the engine has a worker.

            submit                     schedule, or a stretch
    idle -----------> at a boundary ----------------------------> busy until `ends_ms`
      ^                   ^   | nothing to do                        |
      |                   |   |                                      |
      '-------------------+---'            finish_work <-------------'

What is busy cannot be changed, except that a stretch ends with the step in which somebody arrives.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from scalellm.controller.blueprint.cost import ShapeCost
from scalellm.engine.kv_cache import KVCache
from scalellm.engine.request import Request
from scalellm.engine.step import Limits, Output, Step
from scalellm.engine.step_time import StepShape, StepTime
from scalellm.errors import EngineError
from scalellm.simulator.step_time import CalibratedStepTime
from scalellm.simulator.stretch import Stretch, StretchScheduler, sampled_id


class SimulatedReplica:
    """Times in milliseconds of simulated time."""

    def __init__(
        self,
        shape: ShapeCost,
        *,
        prefix_caching: bool = False,
        exact: bool = False,
        others_busy: Callable[[], int] = lambda: 0,
    ) -> None:
        """`exact` computes every step by itself, none in closed form; `others_busy`: how many other
        devices of the host compute now, which is asked when a step begins."""
        self.shape = shape
        limits = Limits(
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=max(shape.max_num_batched_tokens, shape.max_num_seqs),
            max_model_len=shape.max_model_len,
            step_budget_ms=shape.step_budget_ms,
        )
        blocks = max(1, shape.kv_tokens // shape.block_size)
        kv = KVCache(blocks, shape.block_size, prefix_caching)
        self._step_time = CalibratedStepTime(shape.cost)
        self.scheduler = StretchScheduler(limits, kv, self._step_time)
        self.ends_ms = math.inf  # of the work in progress; infinite while idle
        self.busy_ms = 0.0
        self.steps = 0
        self.step_ms = 0.0  # of the last step that ended
        self._learnt = StepTime()  # what an engine would say of its steps
        self._exact = exact
        self._others_busy = others_busy
        self._step: Step | None = None
        self._stretch: Stretch | None = None
        self._started_ms = 0.0

    @property
    def is_idle(self) -> bool:
        return self._step is None and self._stretch is None

    def submit(self, request: Request, now_ms: float) -> list[Output]:
        """Queue a request; an idle replica begins at once. Returns what ended by being refused."""
        self.interrupt(now_ms)
        self.scheduler.add(request, microseconds(now_ms))
        if self.is_idle:
            self._begin(now_ms)
            return self.scheduler.take_outputs()
        return []

    @property
    def step_cost(self) -> tuple[float, float, float, float]:
        """As the engine fits it to the steps it has measured."""
        return self._learnt.coefficients

    def kv_blocks_used(self, now_ms: float) -> float:
        """Of a stretch under way, as many as its tokens fill by then."""
        scheduler = self.scheduler
        if self._stretch is None:
            return scheduler.kv.num_used
        tokens = self._stretch.begun_by(now_ms) * scheduler.num_running
        used = scheduler.kv.num_used + tokens / self.shape.block_size
        return min(float(scheduler.kv.num_blocks), used)

    def interrupt(self, now_ms: float) -> None:
        """Let a stretch end with the step that runs at `now_ms`."""
        if self._stretch is not None:
            stretch = self._stretch
            self._stretch = replace(stretch, steps=stretch.begun_by(now_ms))
            self.ends_ms = self._stretch.end_ms()

    def finish_work(self) -> list[Output]:
        """End the work in progress at `ends_ms` and begin the next. Returns what came of it."""
        now_ms = self.ends_ms
        self._end(now_ms)
        outputs = self.scheduler.take_outputs()
        self._begin(now_ms)
        return outputs + self.scheduler.take_outputs()

    def stop(self) -> tuple[list[Output], list[Request]]:
        """End the work in progress at `ends_ms` for good: what came of it, and what is left."""
        if not self.is_idle:
            self._end(self.ends_ms)
        self.ends_ms = math.inf
        return self.scheduler.take_outputs(), list(self.scheduler.requests.values())

    def _begin(self, now_ms: float) -> None:
        scheduler = self.scheduler
        self._started_ms = now_ms
        self.ends_ms = math.inf
        if self.shape.beside > 1.0:
            self._step_time.pace = self.shape.pace(self._others_busy())
        if not self._exact:
            self._stretch = scheduler.stretch(now_ms, self.shape.cost, self._step_time.pace)
            if self._stretch is not None:
                self.ends_ms = self._stretch.end_ms()
                return
        step = scheduler.schedule(microseconds(now_ms))
        if step.keys:
            self._step = step
            self.ends_ms = now_ms + step.predicted_ms
        elif scheduler.requests:
            raise EngineError("the scheduler has requests and gives none of them work")

    def _end(self, now_ms: float) -> None:
        scheduler, step, stretch = self.scheduler, self._step, self._stretch
        self._step = self._stretch = None
        self.busy_ms += now_ms - self._started_ms
        if step is not None:
            self.steps += 1
            self._ended_step(step.shape, step.predicted_ms)
            scheduler.update(step, _sampled(scheduler, step), microseconds(now_ms))
        elif stretch is not None:
            self.steps += stretch.steps
            self._ended_step(*stretch.last())
            scheduler.advance(stretch.steps, microseconds(now_ms))

    def _ended_step(self, shape: StepShape, ms: float) -> None:
        """The last one stands for all of a stretch."""
        self.step_ms = ms
        self._learnt.observe(shape, ms)


def _sampled(scheduler: StretchScheduler, step: Step) -> Sequence[int]:
    return [sampled_id(scheduler.requests[key]) for key in step.keys]


def microseconds(now_ms: float) -> int:
    """As the scheduler counts; it takes 0 for "never"."""
    return max(1, round(now_ms * 1e3))
