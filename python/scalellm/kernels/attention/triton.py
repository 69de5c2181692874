"""Attention in Triton, over the cache that cache.py draws and rotary/triton.py fills.

    decode     one query a sequence, split over its keys and values   per sequence, kv head, split
    combine    the splits' softmaxes to one                           per sequence and head
    prefill    several queries a sequence                             per tile of queries and head

All queries that share a kv head are rows of one product when decoding, so its keys and values are
read once. Softmaxes are online (Milakov and Gimelshein, 2018), prefill is tiled as in
FlashAttention-2 (Dao, 2023), splits are combined as in Flash-Decoding (Dao et al., 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.attention.cache import LayerCache
from scalellm.kernels.attention.heads import Heads
from scalellm.kernels.attention.paged import PREFILL_TILE, PagedStep
from scalellm.kernels.rotary.triton import store_kv

KEY_TILE = 64  # keys of one step of a program's loop
MAX_SPLITS = 32
_PROGRAMS = 264  # to aim for: two for each multiprocessor of an H100 or H200
_LOG2_E = 1.4426950408889634


def attention(
    qkv: Tensor, heads: Heads, angles: Tensor, cache: LayerCache, step: PagedStep
) -> Tensor:
    """[T, (heads + 2 kv heads) * head_dim] -> [T, heads * head_dim]."""
    query = store_kv(qkv, heads, angles, cache, step)
    out = query.new_empty(query.shape)
    if len(step.decodes):
        decode(query, heads, cache, step, out)
    if step.prompts is not None:
        step.prompts.run(query, heads, cache, out)
    elif len(step.tiles):
        prefill(query, heads, cache, step, out)
    return out.view(len(out), -1)


@triton.jit
def _attend(
    q,
    keys,
    values,
    table,
    kv_head,
    begin,
    end,
    low,
    high,
    block_size,
    scale,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend with `q` [ROWS, BLOCK] to tiles begin .. end - 1; row r sees positions low[r] to
    high[r] - 1. Returns its sums [ROWS, BLOCK], their weight and the largest score, base 2."""
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.max(high)
    for tile in range(begin, end):
        position = tile * TILE + tl.arange(0, TILE)
        exists = position < last
        block = tl.load(table + position // block_size, mask=exists, other=0).to(tl.int64)
        place = ((block * KV_HEADS + kv_head) * block_size + position % block_size) * DIM
        there = exists[:, None] & inside[None, :]
        k = tl.load(keys + place[:, None] + columns[None, :], mask=there, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        shrink = tl.exp2(largest - base)
        p = tl.exp2(scores - base[:, None])
        v = tl.load(values + place[:, None] + columns[None, :], mask=there, other=0.0).to(q.dtype)
        weight = weight * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
        largest = peak
    return sums, weight, largest


@triton.jit
def _decode(
    query, keys, values, spans, tables, decodes, out, sums_of_split, weights_of_split, width,
    block_size, scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    span = tl.load(decodes + index).to(tl.int64)
    row = tl.load(spans + 3 * span).to(tl.int64)
    length = tl.load(spans + 3 * span + 1) + tl.load(spans + 3 * span + 2)
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    begin = first // TILE
    tiles = tl.cdiv(length, TILE) - begin
    share = tl.cdiv(tiles, SPLITS)
    start = begin + split * share
    stop = tl.minimum(start + share, begin + tiles)
    member = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = (member < GROUP)[:, None] & (columns < DIM)[None, :]
    head = kv_head * GROUP + member
    place = (row * HEADS + head)[:, None] * DIM + columns[None, :]
    q = tl.load(query + place, mask=there, other=0.0)
    low = tl.zeros([ROWS], tl.int32) + first
    high = tl.zeros([ROWS], tl.int32) + length
    sums, weight, largest = _attend(
        q, keys, values, tables + span * width, kv_head, start, stop, low, high, block_size, scale,
        KV_HEADS, DIM, ROWS, TILE, BLOCK,
    )  # fmt: skip
    if SPLITS == 1:
        whole = sums / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(out + place, whole.to(out.dtype.element_ty), mask=there)
    else:
        part = (index.to(tl.int64) * HEADS + head) * SPLITS + split
        mine = member < GROUP
        tl.store(sums_of_split + part[:, None] * DIM + columns[None, :], sums, mask=there)
        tl.store(weights_of_split + 2 * part, weight, mask=mine)
        tl.store(weights_of_split + 2 * part + 1, largest, mask=mine)


@triton.jit
def _combine(
    sums_of_split,
    weights_of_split,
    spans,
    decodes,
    out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(spans + 3 * tl.load(decodes + index).to(tl.int64)).to(tl.int64)
    part = (index * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    weight = tl.load(weights_of_split + 2 * part)
    largest = tl.load(weights_of_split + 2 * part + 1)
    peak = tl.max(largest)
    factor = tl.exp2(largest - tl.where(peak == float("-inf"), 0.0, peak))
    place = part[:, None] * DIM + columns[None, :]
    sums = tl.load(sums_of_split + place, mask=inside[None, :], other=0.0)
    total = tl.sum(weight * factor)
    whole = tl.sum(sums * factor[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = (row * HEADS + head) * DIM + columns
    tl.store(out + place, whole.to(out.dtype.element_ty), mask=inside)


def _shape(heads: Heads) -> dict[str, int]:
    """What a kernel that attends is compiled for."""
    return {
        "HEADS": heads.num_heads,
        "KV_HEADS": heads.num_kv_heads,
        "DIM": heads.head_dim,
        "WINDOW": heads.window or 0,
        "TILE": KEY_TILE,
        "BLOCK": max(16, triton.next_power_of_2(heads.head_dim)),
    }


def splits_for(sequences: int, kv_heads: int, longest: int) -> int:
    """Parts to cut each sequence's keys into: a power of two that fills a GPU, and gives no part
    less than a tile when a sequence has `longest` tokens."""
    splits = 1
    while (
        splits < MAX_SPLITS
        and sequences * kv_heads * splits < _PROGRAMS
        and 2 * splits * KEY_TILE <= longest
    ):
        splits *= 2
    return splits


def decode(
    query: Tensor,
    heads: Heads,
    cache: LayerCache,
    step: PagedStep,
    out: Tensor,
    splits: int | None = None,
) -> None:
    """Of the rows of `query` [T, heads, head_dim] that are alone in their spans, into `out`."""
    count, dim = len(step.decodes), heads.head_dim
    block_size = cache.keys.shape[2]
    if splits is None:
        splits = splits_for(count, heads.num_kv_heads, step.tables.shape[1] * block_size)
    sums, weights = out, out
    if splits > 1:
        parts = (count, heads.num_heads, splits)
        sums = torch.empty(*parts, dim, dtype=torch.float32, device=query.device)
        weights = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
    shape = _shape(heads)
    _decode[(count, heads.num_kv_heads, splits)](
        query,
        cache.keys,
        cache.values,
        step.spans,
        step.tables,
        step.decodes,
        out,
        sums,
        weights,
        step.tables.stride(0),
        block_size,
        heads.scale * _LOG2_E,
        **shape,
        SPLITS=splits,
        ROWS=max(16, triton.next_power_of_2(heads.num_heads // heads.num_kv_heads)),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _combine[(count, heads.num_heads)](
            sums, weights, step.spans, step.decodes, out,
            HEADS=heads.num_heads, DIM=dim, SPLITS=splits, BLOCK=shape["BLOCK"], num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["width"])
def _prefill(
    query, keys, values, spans, tables, tiles, out, width, block_size, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    head = tl.program_id(1)
    span = tl.load(tiles + 2 * index).to(tl.int64)
    first = tl.load(tiles + 2 * index + 1)
    first_row = tl.load(spans + 3 * span)
    start = tl.load(spans + 3 * span + 1)
    count = tl.load(spans + 3 * span + 2)
    member = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = (member < count)[:, None] & (columns < DIM)[None, :]
    row = (first_row + member).to(tl.int64)
    place = (row * HEADS + head)[:, None] * DIM + columns[None, :]
    q = tl.load(query + place, mask=there, other=0.0)
    high = tl.minimum(start + member, start + count - 1) + 1
    low = tl.zeros([ROWS], tl.int32)
    begin = start * 0
    if WINDOW > 0:
        low = tl.maximum(high - WINDOW, 0)
        begin = tl.maximum(start + first + 1 - WINDOW, 0) // TILE
    stop = tl.cdiv(tl.max(high), TILE)
    sums, weight, _ = _attend(
        q, keys, values, tables + span * width, head // (HEADS // KV_HEADS), begin, stop, low, high,
        block_size, scale, KV_HEADS, DIM, ROWS, TILE, BLOCK,
    )  # fmt: skip
    whole = sums / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out + place, whole.to(out.dtype.element_ty), mask=there)


def prefill(query: Tensor, heads: Heads, cache: LayerCache, step: PagedStep, out: Tensor) -> None:
    """Of the rows of `query` [T, heads, head_dim] in spans of several tokens, into `out`."""
    _prefill[(len(step.tiles), heads.num_heads)](
        query,
        cache.keys,
        cache.values,
        step.spans,
        step.tables,
        step.tiles,
        out,
        step.tables.stride(0),
        cache.keys.shape[2],
        heads.scale * _LOG2_E,
        **_shape(heads),
        ROWS=PREFILL_TILE,
        num_warps=4,
        num_stages=2,
    )
