"""The loop's time, phase by phase."""

import time

from scalellm.engine.phases import PhaseClock, phases_between


def test_no_time_is_lost_or_counted_twice() -> None:
    began = time.perf_counter_ns()
    clock = PhaseClock()
    for _ in range(200):
        clock.mark("schedule")
        time.sleep(0.0001)
        clock.mark_parts({"forward/linear": 0.02, "forward": 0.03}, "hand over")
    ended = time.perf_counter_ns()
    total_us = sum(clock.totals().values())
    assert total_us <= (ended - began) // 1000
    assert total_us >= 200 * 100
    assert clock.totals()["forward/linear"] == 200 * 20


def test_parts_are_cut_to_the_time_there_was() -> None:
    clock = PhaseClock()
    clock.mark("before")
    clock.mark_parts({"forward": 1e6, "sample": 1e6}, "hand over")
    totals = clock.totals()
    assert totals["forward"] < 1e6 and totals["sample"] == 0 and totals["hand over"] == 0


def test_a_difference_names_what_took_time_in_between() -> None:
    earlier = {"schedule": 5, "forward": 100}
    later = {"schedule": 5, "forward": 250, "sample": 7}
    assert phases_between(earlier, later) == [("forward", 150), ("sample", 7)]
    assert phases_between(None, later) == []
