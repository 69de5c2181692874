"""Drawing gives the ids that the CPU's kernels draw, for every kind of row."""

import numpy as np
import pytest
import torch

from scalellm.kernels import device
from scalellm.kernels.sampling import DRAW, draw

VOCAB = 1300  # three groups, the last one short


def rows_of(*rows, seed=11):
    """(temperature, top_p, min_p, top_k) with a seed, a choice and an index each."""
    return np.array([(*row, seed + 2**63 * (i % 2), i, 3 * i) for i, row in enumerate(rows)], DRAW)


def same(scores, draws):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "on_gpu", lambda _x: False)
        expected = draw(scores.cpu(), draws)
    assert draw(scores, draws) == expected


def test_greedy_takes_the_lowest_of_the_largest(numbers):
    from scalellm.kernels.sampling import triton

    scores = numbers(4, VOCAB)
    scores[0, [700, 20]] = 9.0
    scores[1, 1299] = 9.0
    assert triton.greedy(scores)[:2].tolist() == [20, 1299]
    assert torch.equal(triton.greedy(scores).long(), scores.argmax(-1))


@pytest.mark.parametrize("seed", range(4))
def test_noise_over_the_whole_vocabulary(seed, numbers):
    scores = 3 * numbers(5, 2 * VOCAB)[:, :VOCAB] + seed
    same(scores, rows_of((1.0, 1, 0, 0), (0.0, 1, 0, 0), (0.3, 1, 0, 0), (2.0, 1, 0, 0),
                         (9.0, 1, 0, 0), seed=seed))  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        (1.0, 1, 0, 1), (1.0, 1, 0, 7), (5.0, 1, 0, 5000), (1.0, 0.9, 0, 0), (3.0, 0.5, 0, 0),
        (1.0, 0.0, 0, 0), (2.0, 1, 0.05, 0), (2.0, 0.8, 0.01, 40), (0.0, 0.5, 0, 3),
    ],
    ids=str,
)  # fmt: skip
def test_truncated(row, numbers):
    scores = 4 * numbers(2, VOCAB)
    same(scores, rows_of(row, row))


def test_ties_at_the_end_of_top_k_and_top_p(numbers):
    """Scores on a coarse grid: dozens are equal; top_k keeps them all, top_p the lowest ids."""
    scores = (4 * numbers(4, VOCAB)).round()
    same(scores, rows_of((2.0, 1, 0, 30), (2.0, 0.7, 0, 0), (2.0, 0.3, 0, 60), (1.5, 0.97, 0, 0)))


def test_rows_without_a_finite_largest_score_have_no_token(numbers):
    scores = numbers(5, VOCAB)
    scores[0, 3], scores[1, 900] = torch.nan, torch.inf
    scores[2] = -torch.inf
    scores[3, 5:] = -torch.inf
    same(scores, rows_of(*[(1.0, 1, 0, 0)] * 5))
    same(scores, rows_of(*[(1.0, 0.9, 0, 0)] * 5))
    same(scores, rows_of(*[(0.0, 1, 0, 0)] * 5))
