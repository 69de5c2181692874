"""Which requests a replica gives back, and when."""

from scalellm.engine.hand_over import SHARE, HandOver
from scalellm.engine.kv_cache import KVCache
from scalellm.engine.request import Request, Sampling
from scalellm.engine.scheduler import Scheduler
from scalellm.engine.step import Limits
from scalellm.engine.step_time import StepShape, StepTime

STREAM_MS = 100.0  # what computing a stream's tokens again takes


class Known(StepTime):
    """Every prompt takes the same."""

    def predict_ms(self, shape: StepShape) -> float:
        return STREAM_MS if shape.tokens else 0.0


def scheduler(streams: int, waiting: int) -> Scheduler:
    """Streams with 1, 2, ... tokens left, and requests that wait for a place."""
    limits = Limits(streams, 1024, 128, 1e9)
    made = Scheduler(limits, KVCache(256, 4, False), Known())
    for key in range(streams + waiting):
        left = key + 2 if key < streams else 50
        made.add(Request(key, [1, 2, 3], left, Sampling()), 1)
    step = made.schedule(1)
    made.update(step, [5] * len(step.keys), 2)
    return made


def test_streams_go_at_the_pace_of_those_who_compute_them_and_then_what_waits() -> None:
    made = scheduler(streams=6, waiting=2)
    hand_over = HandOver(10.0)
    made.cancel(*hand_over.due(made, 10.0), 3)  # the stream with most left
    assert 5 not in made.requests and len(made.requests) == 7
    assert list(hand_over.due(made, 10.0 + 0.9 * STREAM_MS / 1e3 / SHARE)) == []
    for second, expected in ((1.1, [4]), (3.1, [3, 2]), (60.0, [1, 0, 6, 7])):
        due = list(hand_over.due(made, 10.0 + second * STREAM_MS / 1e3 / SHARE))
        assert due == expected
        for key in due:
            made.cancel(key, 3)
    assert not made.requests


def test_what_waits_is_not_admitted_by_a_replica_that_hands_over() -> None:
    made = scheduler(streams=2, waiting=1)
    made.admits = False
    made.cancel(0, 3)
    assert list(made.schedule(4).keys) == [1]
    assert list(HandOver(0.0).due(made, 60.0)) == [1, 2]


def test_an_engine_that_has_computed_nothing_gives_all_back_at_once() -> None:
    limits = Limits(4, 1024, 128, 1e9)
    made = Scheduler(limits, KVCache(64, 4, False))
    for key in range(3):
        made.add(Request(key, [1, 2, 3], 9, Sampling()), 1)
    made.schedule(1)
    assert list(HandOver(0.0).due(made, 0.0)) == [0, 1, 2]
