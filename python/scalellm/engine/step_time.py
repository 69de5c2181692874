"""Predicts how long a step takes, from the steps measured so far.

    time_ms = c0 + c1 * tokens + c2 * sum over spans of (tokens * mean context) + c3 * spans

c1 is the matrix work, c2 the attention, so a chunk of a prompt costs more the more context it has.
The coefficients are the non-negative least squares fit to recent steps, errors taken relative to
the measured time, so that short decode steps count as much as long prefill ones. Older steps fade.
Pure: equal observations give equal predictions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_FEATURES = 4
_FADE = 0.98  # weight of an observation falls by this with each later one: the last 50 count
_SWEEPS = 30
_REFIT_EVERY = 8  # observations, once the first few are in
_UNPROVEN_GROWTH = 2  # a chunk may exceed what was ever measured by this factor
_FIRST_CHUNK_TOKENS = 128  # before anything was measured


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on."""

    tokens: int = 0
    attended: float = 0.0  # sum over tokens of the positions each attends to
    spans: int = 0
    read: float = 0.0  # sum over spans of the positions whose keys and values are read

    def with_span(self, start: int, tokens: int) -> "StepShape":
        attended = tokens * start + tokens * (tokens + 1) / 2
        return StepShape(
            self.tokens + tokens,
            self.attended + attended,
            self.spans + 1,
            self.read + start + tokens,
        )


class StepTime:
    """Online model of step time."""

    def __init__(self) -> None:
        self._gram = [[0.0] * _FEATURES for _ in range(_FEATURES)]
        self._moment = [0.0] * _FEATURES
        self._coefficients = [0.0] * _FEATURES
        self._count = 0
        self._largest_tokens = 0

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """(c0, c1, c2, c3); all zero before the first observation."""
        fixed, token, attended, span = self._coefficients
        return fixed, token, attended, span

    def observe(self, shape: StepShape, elapsed_ms: float) -> None:
        """Learn from a measured step. Times that cannot be are ignored."""
        if not math.isfinite(elapsed_ms) or elapsed_ms <= 0.0 or shape.tokens < 1:
            return
        row = (1.0, float(shape.tokens), shape.attended, float(shape.spans))
        weight = 1.0 / (elapsed_ms * elapsed_ms)
        for i in range(_FEATURES):
            scaled = weight * row[i]
            gram = self._gram[i]
            for j in range(_FEATURES):
                gram[j] = _FADE * gram[j] + scaled * row[j]
            self._moment[i] = _FADE * self._moment[i] + scaled * elapsed_ms
        self._count += 1
        self._largest_tokens = max(self._largest_tokens, shape.tokens)
        if self._count <= 2 * _REFIT_EVERY or self._count % _REFIT_EVERY == 0:
            self._coefficients = _non_negative_fit(self._gram, self._moment, self._coefficients)

    def predict_ms(self, shape: StepShape) -> float:
        if shape.tokens < 1:
            return 0.0
        c0, c1, c2, c3 = self._coefficients
        return c0 + c1 * shape.tokens + c2 * shape.attended + c3 * shape.spans

    def largest_chunk(self, shape: StepShape, start: int, budget_ms: float) -> int:
        """Most tokens that one more span, after `start` cached ones, may add to `shape`.

        The step's predicted time stays within `budget_ms`; 0 if nothing fits. Not beyond twice the
        tokens ever measured, because the prediction is not worth more than that.
        """
        proven = max(_FIRST_CHUNK_TOKENS, _UNPROVEN_GROWTH * self._largest_tokens)
        limit = max(0, proven - shape.tokens)
        c0, c1, c2, c3 = self._coefficients
        left = budget_ms - (c0 + c1 * shape.tokens + c2 * shape.attended + c3 * (shape.spans + 1))
        if left <= 0.0:
            return 0
        # left = quadratic * n^2 + linear * n
        quadratic = c2 / 2
        linear = c1 + c2 * (start + 0.5)
        reach = left / linear if linear > 0.0 else math.inf
        if quadratic > 0.0:
            reach = 2 * left / (linear + math.sqrt(linear * linear + 4 * quadratic * left))
        return limit if reach >= limit else int(reach)

    def as_long_as(self, tokens: int, start: int) -> int:
        """How many tokens after `start` others take the time of `tokens` at a sequence's beginning.

        At least 1; `tokens` as long as nothing is known."""
        _, c1, c2, _ = self._coefficients
        at_beginning = c1 + c2 * (tokens + 1) / 2
        here = at_beginning + c2 * start
        return tokens if here <= 0.0 else max(1, round(tokens * at_beginning / here))


def _non_negative_fit(
    gram: Sequence[Sequence[float]], moment: Sequence[float], start: Sequence[float]
) -> list[float]:
    """Minimise the quadratic form over x >= 0 by cyclic coordinate descent; cannot diverge."""
    found = list(start)
    for _ in range(_SWEEPS):
        for i in range(_FEATURES):
            row = gram[i]
            if row[i] <= 0.0:
                continue
            rest = sum(row[j] * found[j] for j in range(_FEATURES) if j != i)
            found[i] = max(0.0, (moment[i] - rest) / row[i])
    return found
