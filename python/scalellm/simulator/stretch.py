"""Many steps at once: where every step would be the same, their sum is known.

While nobody arrives, ends or runs out of blocks, each running stream gets a token a step and each
step costs a little more than the one before, by one more position to attend to for each stream:

    k steps = k * first + slope * k * (k - 1) / 2        slope = per_context * streams
"""

import math
from dataclasses import dataclass, replace

from scalellm.controller.blueprint.cost import StepCost
from scalellm.engine.request import Request
from scalellm.engine.scheduler import Scheduler
from scalellm.engine.step_time import StepShape


@dataclass(frozen=True, slots=True)
class Stretch:
    """`steps` steps from `start_ms` on, in each of which the same streams get a token."""

    start_ms: float
    steps: int
    first: StepShape
    first_ms: float
    slope_ms: float

    def end_ms(self, steps: int | None = None) -> float:
        """When so many of the steps are done; all of them by default."""
        count = self.steps if steps is None else steps
        return self.start_ms + count * self.first_ms + self.slope_ms * count * (count - 1) / 2

    def last(self) -> tuple[StepShape, float]:
        """The last step, and its milliseconds."""
        more = (self.steps - 1) * self.first.spans
        context = self.first.attended + more
        shape = replace(self.first, attended=context, read=context)
        return shape, self.first_ms + self.slope_ms * (self.steps - 1)

    def begun_by(self, now_ms: float) -> int:
        """Steps that have begun before `now_ms`, at least one: these can no longer be changed."""
        if self.slope_ms > 0.0:
            half = self.first_ms / self.slope_ms - 0.5
            passed = 2 * max(0.0, now_ms - self.start_ms) / self.slope_ms
            count = math.ceil(math.sqrt(half * half + passed) - half)
        else:
            count = math.ceil((now_ms - self.start_ms) / self.first_ms)
        count = min(max(1, count), self.steps)
        # the root is a rounded number, the ends below are what counts
        while count > 1 and self.end_ms(count - 1) >= now_ms:
            count -= 1
        while count < self.steps and self.end_ms(count) < now_ms:
            count += 1
        return count


class StretchScheduler(Scheduler):
    """The engine's scheduler, which can also be told the outcome of many equal steps."""

    def stretch(self, start_ms: float, cost: StepCost, pace: float = 1.0) -> Stretch | None:
        """The steps from now until the first stream ends or blocks run out, at `pace` x `cost`.

        None unless the next step gives every running request one token and admits nobody: either
        nobody waits, or all places are taken."""
        running = self._running
        full = len(running) >= self.limits.max_num_seqs
        if not running or self._blocks.reserved or (self._waiting and not full):
            return None
        steps = self.max_model_len
        attended = 0
        for request in running:
            computed = request.num_computed_tokens
            if request.num_tokens - computed != 1 or request.first_token_us == 0:
                return None
            attended += computed + 1
            left = request.max_tokens - request.num_output_tokens
            steps = min(steps, left, self.max_model_len - request.num_tokens)
        if steps < 1:
            return None
        while self._blocks_for(steps) > self.kv.num_free:
            steps //= 2
            if steps == 0:
                return None
        streams = len(running)
        first = StepShape(streams, attended, streams, attended)
        first_ms = pace * cost.step_ms(streams, attended, streams, attended)
        return Stretch(start_ms, steps, first, first_ms, pace * cost.per_context_ms * streams)

    def _blocks_for(self, steps: int) -> int:
        """Blocks to be taken for so many steps; the last token's position is not written."""
        return sum(
            max(0, self._blocks.lacking(request, request.num_tokens + steps - 1))
            for request in self._running
        )

    def advance(self, steps: int, now_us: int) -> None:
        """What `steps` times schedule and update would have done, ending at `now_us`."""
        for request in self._running.copy():
            token_id = sampled_id(request)
            lacking = self._blocks.lacking(request, request.num_tokens + steps - 1)
            if lacking > 0:
                self._blocks.grow(request, lacking)
            request.steps += steps
            request.num_computed_tokens += steps
            if steps > 1:
                request.token_ids.extend([token_id] * (steps - 1))
            self._blocks.store_full(request)
            if request.num_output_tokens + 1 >= request.max_tokens or (
                request.num_tokens + 1 >= self.max_model_len
            ):
                self._append_tokens(request, (token_id,), now_us)
            else:
                request.token_ids.append(token_id)


def sampled_id(request: Request) -> int:
    """The id that a simulated model answers with: what one request says, no other does."""
    return request.key & 0x7FFFFFFF
