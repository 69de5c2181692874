"""A replica that another shape replaces gives its requests back, a few at a time.

Whoever takes one over computes its tokens again, on devices that both shapes share for a while. All
at once, the last of many would wait until those before it are computed; at a pace that the new
shape can keep, each pauses about as long as its own tokens take, and the others go on here:

    streams, longest first     whose tokens take `SHARE` of the time that passes; those that have
                               little left end here in the meantime
    then what waits, at once   nothing of it was computed, nobody sees it pause, and before the
                               streams its prompts would be in their way; here it is not admitted
"""

from collections.abc import Iterator

from scalellm.engine.request import Request, Status
from scalellm.engine.scheduler import Scheduler
from scalellm.engine.step_time import StepShape

SHARE = 0.4


class HandOver:
    """Says which requests to give back; times are given by the caller."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._computed_again_ms = 0.0

    def due(self, scheduler: Scheduler, now_s: float) -> Iterator[int]:
        """Keys of the requests to give back now; the first stream is always due."""
        waiting: list[Request] = []
        streams: list[Request] = []
        for request in scheduler.requests.values():
            is_new = request.status is Status.WAITING and request.num_output_tokens == 0
            (waiting if is_new else streams).append(request)
        passed_ms = 1e3 * (now_s - self._began_s)
        for request in sorted(streams, key=_urgency):
            if self._computed_again_ms > SHARE * passed_ms:
                return
            shape = StepShape().with_span(0, request.num_tokens)
            self._computed_again_ms += scheduler.step_time.predict_ms(shape)
            yield request.key
        yield from [request.key for request in waiting]


def _urgency(request: Request) -> tuple[bool, int]:
    """Preempted ones first, which get on no more, then those with most tokens left."""
    return request.status is Status.RUNNING, request.num_output_tokens - request.max_tokens
