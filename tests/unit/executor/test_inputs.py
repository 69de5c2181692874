"""A batch becomes tensors, and one that contradicts itself is refused before it can harm."""

import numpy as np
import pytest
import torch

from scalellm.executor.batch import Batch, Span
from scalellm.executor.inputs import build_arrays, build_step
from scalellm.kernels.attention import KVCache, KVGeometry

CPU = torch.device("cpu")
GEOMETRY = KVGeometry(2, 3, 4, 4, (None, None))
CACHE = KVCache.allocate(GEOMETRY, 10, 4, torch.float32, CPU)


def build(*spans):
    arrays = build_arrays(Batch(spans), CACHE.block_size, CACHE.num_blocks)
    return build_step(arrays, CACHE, GEOMETRY, torch.float32, CPU)


def test_tokens_positions_and_logit_rows():
    ids, step = build(
        Span([7, 8, 9], 2, [5, 1], 2), Span([4], 11, [0, 2, 3], 1), Span([6], 0, [9], 0)
    )
    assert ids.tolist() == [7, 8, 9, 4, 6]
    assert step.positions.tolist() == [2, 3, 4, 11, 0]
    assert step.logit_rows.tolist() == [1, 2, 3]


def test_spans_and_tables_lie_one_after_the_other():
    spans = (Span([7, 8, 9], 2, [5, 1], 2), Span([4], 11, range(3), 1), Span([6], 0, [9], 0))
    arrays = build_arrays(Batch(spans), 4, 10)
    assert arrays.spans.tolist() == [[0, 2, 3, 0], [3, 11, 1, 2], [4, 0, 1, 5]]
    assert arrays.tables.tolist() == [5, 1, 0, 1, 2, 9]
    assert arrays.spans.flags.c_contiguous and arrays.tables.dtype == np.int32


def test_rows_of_the_cache_by_token_and_head():
    """Position 3 lies in row 3 of block 5, position 4 in row 0 of block 1."""
    _, step = build(Span([7, 8], 3, [5, 1], 0))
    rows = [(5 * 3 + head) * 4 + 3 for head in range(3)] + [(1 * 3 + head) * 4 for head in range(3)]
    assert step.attention.write.tolist() == rows


@pytest.mark.parametrize(
    ("start", "count", "begun"),
    [(0, 4, None), (0, 3, [6]), (3, 2, [2]), (4, 1, [2]), (5, 1, None), (0, 9, [8]), (7, 1, None)],
)
def test_only_blocks_begun_and_not_filled_are_cleared(start, count, begun):
    _, step = build(Span([1] * count, start, [6, 2, 8], 0))
    found = step.attention.begun
    assert (None if found is None else found.tolist()) == begun


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span([], 0, [0], 0), "span of 0 tokens"),
        (Span([1], -1, [0], 0), "from -1"),
        (Span([1], 0, [0], 2), "2 logits"),
        (Span([1], 0, [0], -1), "-1 logits"),
        (Span([1], 4, [0], 0), "1 blocks do not cover 5 tokens"),
        (Span([1], 0, [10], 0), r"outside 0 \.\. 9"),
        (Span([1], 0, [-1], 0), r"outside 0 \.\. 9"),
    ],
)
def test_contradictions_are_refused(span, message):
    with pytest.raises(ValueError, match=message):
        build(span)


def test_batch_counts():
    batch = Batch((Span([1, 2], 0, [0], 1), Span([3], 0, [1], 0)))
    assert (batch.num_tokens, batch.num_logits) == (3, 1)


def test_cache_memory_is_zero_and_of_its_type():
    cache = KVCache.allocate(GEOMETRY, 5, 2, torch.bfloat16, CPU)
    assert cache.layers[1].keys.shape == (5, 3, 2, 4)
    assert cache.layers[1].values.dtype == torch.bfloat16
    assert not cache.layers[0].keys.any()
    assert GEOMETRY.bytes_per_token(torch.bfloat16) * 10 == sum(
        tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
