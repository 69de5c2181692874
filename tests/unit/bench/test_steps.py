"""The line through measured steps."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scalellm.bench import steps
from scalellm.bench.steps import (
    SHORT_SWEEP,
    SWEEP,
    Recorder,
    Sample,
    fit,
    misfit,
    samples_of,
    slowed,
)
from scalellm.controller.blueprint.cost import StepCost
from scalellm.engine.step_time import StepShape

TRUE = StepCost(20.0, 0.5, 1e-3, 0.25, per_read_ms=2e-3, free_tokens=6)


def sample(tokens: int, attended: int, sequences: int, read: int) -> Sample:
    step_ms = TRUE.step_ms(tokens, attended, sequences, read)
    return Sample(tokens, attended, sequences, read, step_ms)


def test_the_coefficients_of_exact_steps_are_found() -> None:
    decodes = [(n, n * context, n, n * context) for n in (1, 4, 8, 20, 64) for context in (50, 400)]
    shapes = [*decodes, (128, 8_256, 1, 128), (200, 9_000, 16, 300), (600, 90_000, 2, 800)]
    samples = [sample(*shape) for shape in shapes]
    cost = fit(samples)
    assert misfit(cost, samples) == pytest.approx(0.0, abs=1e-9)
    assert cost.base_ms == pytest.approx(20.0)
    assert cost.per_attended_ms == pytest.approx(1e-3)
    assert cost.per_read_ms == pytest.approx(2e-3)
    assert cost.free_tokens == 6


def test_no_coefficient_is_negative() -> None:
    falling = [Sample(1, 1, 1, 1, 30.0), Sample(2, 50, 2, 50, 20.0), Sample(4, 400, 4, 400, 10.0)]
    cost = fit(falling)
    assert min(cost.base_ms, cost.per_token_ms, cost.per_attended_ms, cost.per_sequence_ms) >= 0


def test_equal_steps_are_their_median_and_a_pause_is_not_a_step() -> None:
    shape = StepShape(4, 400.0, 4)
    steps = [(10.0 + 0.02 * at, shape, 18.0) for at in range(7)]
    steps.append((steps[-1][0] + 5.0, shape, 19.0))  # after a pause of five seconds
    (found,) = samples_of(steps)
    assert found.step_ms == pytest.approx(20.0)
    other = StepShape(5, 400.0, 5)
    assert [one.sequences for one in samples_of([*steps, (20.0, other, 1.0)])] == [4, 5]


def test_how_much_slower_steps_were_is_a_median() -> None:
    samples = [sample(n, n * 100, n, n * 100) for n in (1, 2, 4, 8, 16)]
    slower = [replace(one, step_ms=1.3 * one.step_ms) for one in samples]
    disturbed = [*slower[:-1], replace(slower[-1], step_ms=9 * slower[-1].step_ms)]
    assert slowed(TRUE, disturbed) == pytest.approx(1.3)
    assert slowed(TRUE, samples) == pytest.approx(1.0)


def test_no_two_sweeps_of_an_engine_have_a_prompt_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(steps, "run_load", lambda _engine, _load, _vocab, seed: seeds.append(seed))
    measured: Any = SimpleNamespace(
        engine=None, executor=SimpleNamespace(vocab_size=9), recorder=Recorder()
    )
    for number, sweep in enumerate((SWEEP, SWEEP, SHORT_SWEEP, SHORT_SWEEP)):
        steps.run_sweep(measured, sweep, number)
    assert len(set(seeds)) == len(seeds) == 2 * (len(SWEEP) + len(SHORT_SWEEP))
