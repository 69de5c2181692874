"""Paged attention beside torch's: odd heads, blocks, lengths, windows and splits."""

import numpy as np
import pytest
import torch

from scalellm.kernels.attention import HeadNorm, Heads, reference
from scalellm.kernels.attention.paged import plan_pages

from .attention_case import Case

# Tokens before the step, and in it: decodes and prompts, whole and continued.
SPANS = [(0, 1), (70, 1), (5, 3), (0, 67), (33, 20), (12, 1)]


@pytest.mark.parametrize(
    "heads",
    [
        Heads(6, 2, 16, None, None),
        Heads(4, 4, 24, 9, None),
        Heads(3, 1, 20, 64, None),
    ],
    ids=["grouped", "window", "one kv head"],
)
def test_a_mixed_step(heads, numbers, where):
    Case(numbers, where, SPANS, heads).check()


def test_half_precision_and_longer_blocks(numbers, where):
    heads = Heads(4, 2, 32, None, None)
    Case(numbers, where, SPANS, heads, block_size=16, dtype=torch.float16).check(1e-2)


def test_heads_are_normalised_first(numbers, where):
    norm = HeadNorm(numbers(16), numbers(16), 1e-6)
    Case(numbers, where, [(3, 1), (0, 5)], Heads(4, 2, 16, None, norm)).check()


def test_part_of_a_head_is_turned(numbers, where):
    case = Case(numbers, where, [(3, 1), (0, 5)], Heads(2, 1, 16, None, None))
    case.angles = torch.cat([case.angles[:, :4], case.angles[:, 8:12]], -1)
    case.check()


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_splits_change_nothing(splits, numbers, where):
    """More of them than tiles, too."""
    from scalellm.kernels.attention import triton

    heads = Heads(6, 2, 16, None, None)
    case = Case(numbers, where, [(0, 1), (200, 1), (63, 1), (64, 1), (300, 1)], heads)
    expected = reference.attention(case.qkv, heads, case.angles, case.caches[0], case.planned)
    query = triton.store_kv(case.qkv, heads, case.angles, case.caches[1], case.step)
    out = torch.empty_like(query)
    triton.decode(query, heads, case.caches[1], case.step, out, splits)
    torch.testing.assert_close(out.view(5, -1), expected, atol=1e-4, rtol=1e-4)


def test_a_span_of_no_tokens_is_all_zeros(numbers, where):
    """What fills a recorded step up stores nothing and divides by nothing."""
    from scalellm.kernels.attention import triton

    heads = Heads(2, 1, 16, None, None)
    case = Case(numbers, where, [(9, 1), (2, 1)], heads)
    case.step.spans[1, 1:] = 0
    case.step.slots[1] = -1
    before = case.caches[1].keys.clone()
    out = triton.attention(case.qkv, heads, case.angles, case.caches[1], case.step)
    assert (out[1] == 0).all() and (out[0] != 0).any()
    assert (case.caches[1].keys != before).any(-1).sum() == 1


def test_keys_and_values_in_fp8(numbers, where):
    """Stored numbers are within a step of fp8, and attention over them is that of torch."""
    from scalellm.kernels.attention import triton

    heads = Heads(4, 2, 16, None, None)
    case = Case(numbers, where, SPANS, heads)
    small = [
        type(case.caches[0])(
            cache.keys.to(torch.float8_e4m3fn), cache.values.to(torch.float8_e4m3fn)
        )
        for cache in case.caches
    ]
    case.caches = [
        type(small[0])(small[0].keys.float(), small[0].values.float()), small[1],
    ]  # fmt: skip
    found = triton.attention(case.qkv, heads, case.angles, small[1], case.step)
    expected = reference.attention(case.qkv, heads, case.angles, case.caches[0], case.planned)
    torch.testing.assert_close(found, expected, atol=0.3, rtol=0.3)
    stored = small[1].values.float().view(-1, 16)[case.planned.write]
    exact = case.caches[0].values.view(-1, 16)[case.planned.write]
    assert ((stored - exact).abs() <= exact.abs() * 0.51 + 1e-2).all()


def test_a_plan_by_hand():
    """Blocks of 4: a decode at position 5 of blocks 7, 2 and a prompt of 3 in block 9."""
    spans = np.array([[0, 5, 1, 0], [1, 0, 3, 2]])
    plan = plan_pages(spans, np.array([7, 2, 9], dtype=np.int32), 4)
    assert plan.spans.tolist() == [[0, 5, 1], [1, 0, 3]]
    assert plan.tables.tolist() == [[7, 2], [9, 0]]
    assert plan.slots.tolist() == [9, 36, 37, 38]
    assert plan.decodes.tolist() == [0]
    assert plan.tiles.tolist() == [[1, 0]]


def test_splits_fill_a_gpu_and_leave_each_a_tile():
    from scalellm.kernels.attention.triton import splits_for

    assert splits_for(64, 8, 4096) == 1
    assert splits_for(1, 8, 4096) == 32
    assert splits_for(1, 8, 128) == 2
    assert splits_for(8, 8, 4096) == 8
