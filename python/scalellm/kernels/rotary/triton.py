"""Heads normalised and turned, keys and values stored, in one Triton kernel.

A program for each token and head: query heads go to a tensor of their own, key and value heads to
the cache that kernels/attention/cache.py draws.
"""

import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.attention.cache import LayerCache
from scalellm.kernels.attention.heads import Heads
from scalellm.kernels.attention.paged import PagedStep


@triton.jit
def _store_kv(
    qkv,
    query_norm,
    key_norm,
    angles,
    query,
    keys,
    values,
    slots,
    stride,
    block_size,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    row = qkv + token * stride + head * DIM
    x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        HALF: tl.constexpr = TURNED // 2
        first = columns < HALF
        turned = columns < TURNED
        partner = tl.where(first, columns + HALF, columns - HALF)
        other = tl.load(row + partner, mask=turned, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x) / DIM + eps)
            learned = query_norm
            if head >= HEADS:
                learned = key_norm
            x *= scale * tl.load(learned + columns, mask=inside, other=0.0).to(tl.float32)
            other *= scale * tl.load(learned + partner, mask=turned, other=0.0).to(tl.float32)
        pair = tl.where(first, columns, partner)
        cos = tl.load(angles + token * TURNED + pair, mask=turned, other=1.0)
        sin = tl.load(angles + token * TURNED + HALF + pair, mask=turned, other=0.0)
        x = x * cos + tl.where(first, -other, other) * sin
    if head < HEADS:
        out = query + (token * HEADS + head) * DIM + columns
        tl.store(out, x.to(query.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        kv_head = (head - HEADS) % KV_HEADS
        run = (slot // block_size) * KV_HEADS + kv_head
        place = (run * block_size + slot % block_size) * DIM + columns
        if FP8:
            x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        stored = x.to(keys.dtype.element_ty)
        if slot >= 0:
            if head < HEADS + KV_HEADS:
                tl.store(keys + place, stored, mask=inside)
            else:
                tl.store(values + place, stored, mask=inside)


def store_kv(
    qkv: Tensor, heads: Heads, angles: Tensor, cache: LayerCache, step: PagedStep
) -> Tensor:
    """Store the step's keys and values; returns its queries [T, heads, head_dim], turned."""
    tokens, norm = len(qkv), heads.norm
    query = qkv.new_empty(tokens, heads.num_heads, heads.head_dim)
    _store_kv[(tokens, heads.num_heads + 2 * heads.num_kv_heads)](
        qkv,
        qkv if norm is None else norm.query_weight,
        qkv if norm is None else norm.key_weight,
        angles,
        query,
        cache.keys,
        cache.values,
        step.slots,
        qkv.stride(0),
        cache.keys.shape[2],
        0.0 if norm is None else norm.eps,
        HEADS=heads.num_heads,
        KV_HEADS=heads.num_kv_heads,
        DIM=heads.head_dim,
        TURNED=angles.shape[1],
        NORM=norm is not None,
        FP8=cache.keys.dtype.itemsize == 1,
        BLOCK=triton.next_power_of_2(heads.head_dim),
        num_warps=1,
    )
    return query
