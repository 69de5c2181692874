"""The model of step time, fitted online."""

import math
import random

import pytest

from scalellm.engine.step_time import StepShape, StepTime


def machine_ms(shape: StepShape) -> float:
    return 4.0 + 0.3 * shape.tokens + 2e-4 * shape.attended + 0.05 * shape.spans


def trained(rng: random.Random, noise: float = 0.0, steps: int = 200) -> StepTime:
    times = StepTime()
    for _ in range(steps):
        shape = StepShape()
        for _ in range(rng.randrange(0, 40)):
            shape = shape.with_span(rng.randrange(4000), 1)
        if rng.random() < 0.6 or shape.tokens == 0:
            shape = shape.with_span(rng.randrange(4000), rng.randrange(1, 600))
        times.observe(shape, machine_ms(shape) * rng.uniform(1 - noise, 1 + noise))
    return times


def test_attended_positions_are_the_exact_sum() -> None:
    assert StepShape().with_span(10, 3) == StepShape(3, 11.0 + 12.0 + 13.0, 1, 13.0)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.05), (0.2, 0.12)])
def test_predictions_come_close_to_a_machine_of_that_form(noise: float, tolerance: float) -> None:
    rng = random.Random(3)
    times = trained(rng, noise)
    for shape in [
        StepShape().with_span(100, 1),
        StepShape().with_span(3000, 500),
        StepShape(32, 32 * 900.0, 32).with_span(1000, 200),
    ]:
        assert times.predict_ms(shape) == pytest.approx(machine_ms(shape), rel=tolerance)


@pytest.mark.parametrize("start", [0, 500, 4000])
def test_the_largest_chunk_just_fits_the_budget(start: int) -> None:
    times = trained(random.Random(3))
    base = StepShape(10, 10 * 300.0, 10)
    tokens = times.largest_chunk(base, start, 100.0)
    assert times.predict_ms(base.with_span(start, tokens)) <= 100.0
    assert times.predict_ms(base.with_span(start, tokens + 2)) > 100.0


def test_chunks_shrink_with_context() -> None:
    times = trained(random.Random(3))
    chunks = [times.largest_chunk(StepShape(), start, 100.0) for start in (0, 1000, 4000, 16000)]
    assert chunks == sorted(chunks, reverse=True) and chunks[0] > 2 * chunks[-1]


def test_nothing_fits_a_budget_that_is_used_up() -> None:
    times = trained(random.Random(3))
    assert times.largest_chunk(StepShape(1000, 1e5, 1), 0, 50.0) == 0


def test_before_and_beyond_what_was_measured_it_is_careful() -> None:
    times = StepTime()
    assert times.predict_ms(StepShape(5, 5.0, 5)) == 0.0
    assert times.largest_chunk(StepShape(), 0, 1e9) == 128
    times.observe(StepShape().with_span(0, 128), 1.0)
    assert times.largest_chunk(StepShape(), 0, 1e9) == 256


def test_it_follows_a_machine_that_becomes_slower() -> None:
    times = trained(random.Random(3))
    shape = StepShape().with_span(500, 200)
    for _ in range(200):
        times.observe(shape, 3 * machine_ms(shape))
    assert times.predict_ms(shape) == pytest.approx(3 * machine_ms(shape), rel=0.1)


def test_impossible_times_are_ignored() -> None:
    times = StepTime()
    for elapsed_ms in (0.0, -1.0, math.nan, math.inf):
        times.observe(StepShape(1, 1.0, 1), elapsed_ms)
    assert times.coefficients == (0.0, 0.0, 0.0, 0.0)


def test_equal_observations_give_equal_predictions() -> None:
    first, second = (trained(random.Random(9), 0.3).coefficients for _ in range(2))
    assert first == second and all(c >= 0 for c in first)


def test_tokens_with_context_that_take_as_long_as_others_without() -> None:
    assert StepTime().as_long_as(32, 10_000) == 32
    times = trained(random.Random(3))
    fixed, _, _, span = times.coefficients
    for start in (0, 800, 6_000):
        tokens = times.as_long_as(32, start)
        both = [(0, 32), (start, tokens)]
        own = [times.predict_ms(StepShape().with_span(*one)) - fixed - span for one in both]
        assert own[1] == pytest.approx(own[0], abs=own[0] / tokens)
    assert times.as_long_as(32, 10**9) == 1
