"""Experts beside a loop over tokens: few and many tokens, experts that nobody chose, fp8."""

import pytest
import torch

from scalellm.kernels.linear.fp8 import Fp8Matrix, quantise_matrix, stack
from scalellm.kernels.moe import reference
from scalellm.kernels.quantise.reference import quantise_rows
from scalellm.kernels.tuning import Tile

SMALL = Tile(16, 32, 32, 4, 2)


def weights_of(numbers, experts, hidden, inner):
    return numbers(experts, 2 * inner, hidden) / hidden**0.5, numbers(experts, hidden, inner)


@pytest.mark.parametrize(
    ("tokens", "experts", "top", "normalise"),
    [(1, 4, 2, True), (5, 3, 1, False), (40, 5, 3, True), (4, 17, 6, False)],
)
def test_as_a_loop_over_tokens(tokens, experts, top, normalise, numbers):
    from scalellm.kernels.moe import triton

    hidden, inner = 40, 50
    gate_ups, downs = weights_of(numbers, experts, hidden, inner)
    x, logits = numbers(tokens, hidden), numbers(tokens, experts)
    logits[:, 1] -= 100  # nobody's choice
    expected = reference.experts(x, logits, gate_ups, downs, top, normalise)
    found = triton.experts(x, logits, gate_ups, downs, top, normalise, x.dtype, tile=SMALL)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_all_tokens_of_one_expert(numbers):
    """More than a tile of it, and none of the others."""
    from scalellm.kernels.moe import triton

    gate_ups, downs = weights_of(numbers, 4, 16, 20)
    x, logits = numbers(37, 16), numbers(37, 4)
    logits[:, 2] += 100
    found = triton.experts(x, logits, gate_ups, downs, 1, True, x.dtype, tile=SMALL)
    expected = reference.experts(x, logits, gate_ups, downs, 1, True)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_routing(numbers):
    from scalellm.kernels.moe.triton import Routed

    logits = numbers(50, 7)
    routed = Routed(logits, 3, True)
    weights, chosen = reference.route(logits, 3, True)
    torch.testing.assert_close(routed.weights, weights)
    assert torch.equal(routed.chosen.long(), chosen)
    assert torch.equal(routed.counts.long(), torch.bincount(chosen.flatten(), minlength=7))
    by_expert = chosen.flatten()[routed.order.long()]
    assert torch.equal(by_expert, chosen.flatten().sort().values)
    assert sorted(routed.order.tolist()) == list(range(150))


@pytest.mark.parametrize("tokens", [1, 21])
def test_fp8(tokens, numbers):
    """Inner activations are rounded to fp8 too, so a few percent are right."""
    from scalellm.kernels.moe import triton

    hidden, inner, experts = 140, 136, 4
    plain = weights_of(numbers, experts, hidden, inner)
    gate_ups, downs = (stack([quantise_matrix(one) for one in part]) for part in plain)
    assert isinstance(gate_ups, Fp8Matrix) and isinstance(downs, Fp8Matrix)
    x, logits = quantise_rows(numbers(tokens, hidden)), numbers(tokens, experts)
    found = triton.experts(x, logits, gate_ups, downs, 2, True, torch.float32, tile=SMALL)
    wide = (matrix.dequantised(torch.float32) for matrix in (gate_ups, downs))
    expected = reference.experts(x.dequantised(), logits, *wide, 2, True)
    assert (found - expected).norm() / expected.norm() < 0.1


def test_experts_that_other_ranks_have_are_left_to_them(numbers):
    """Two ranks of three experts each; the sum of what they compute is what one computes."""
    from scalellm.kernels.moe import triton

    gate_ups, downs = weights_of(numbers, 6, 16, 20)
    x, logits = numbers(9, 16), numbers(9, 6)
    logits[4, :3] -= 100  # nothing of it is the first rank's
    parts = [
        triton.experts(
            x, logits, gate_ups[i : i + 3], downs[i : i + 3], 2, True, x.dtype, i, tile=SMALL
        )
        for i in (0, 3)
    ]
    assert (parts[0][4] == 0).all()
    expected = reference.experts(x, logits, gate_ups, downs, 2, True)
    torch.testing.assert_close(parts[0] + parts[1], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("shares", "busiest"), [(0, 3), (2, 5), (3, 3)])
def test_layers_are_tallied(shares, busiest, where):
    """Choices of experts 0 to 5: 3, 0, 2, 0, 1, 0; twice."""
    from scalellm.kernels.moe.triton import Routed

    logits = torch.zeros(3, 6, device=where)
    for token, chosen in enumerate([(0, 2), (0, 2), (0, 4)]):
        logits[token, list(chosen)] = 5.0
    tally = torch.zeros(9, dtype=torch.int64, device=where)
    for first in (0, 3):
        Routed(logits, 2, True, first, 3, tally, shares)
    assert tally.tolist() == [2, 6, 2 * busiest, 6, 0, 4, 0, 2, 0]


def test_scores_that_are_not_numbers_choose_experts_that_exist(where):
    from scalellm.kernels.moe.triton import Routed

    routed = Routed(torch.full((4, 5), torch.nan, device=where), 2, True)
    assert ((routed.chosen >= 0) & (routed.chosen < 5)).all()
    assert int(routed.counts.sum()) == 8
