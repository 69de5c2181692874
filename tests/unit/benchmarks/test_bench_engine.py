"""benchmarks/bench_engine.py without an engine."""

import inspect

import bench_engine

from scalellm.engine.loop import Listener


def test_its_listener_can_be_told_what_the_loop_tells() -> None:
    told = inspect.signature(Listener.note_step).parameters
    assert list(inspect.signature(bench_engine.StepNotes.note_step).parameters) == list(told)
