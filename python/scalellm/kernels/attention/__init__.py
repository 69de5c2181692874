"""Attention over a paged KV cache.

cache.py lays the memory out, step.py plans a step, reference.py computes it in torch; packed.py has
the CPU kernels' own layout and plan, cpu.py calls them; paged.py has the GPU's plan, triton.py its
kernels, flashinfer.py another one for prompts.
"""

from torch import Tensor

from scalellm.kernels.attention import cpu, reference
from scalellm.kernels.attention.cache import KVCache, KVGeometry, LayerCache
from scalellm.kernels.attention.heads import HeadNorm, Heads
from scalellm.kernels.attention.packed import (
    PackedKVCache,
    PackedLayerCache,
    PackedStep,
)
from scalellm.kernels.attention.paged import PagedArrays, PagedStep, plan_pages
from scalellm.kernels.attention.reference import paged_attention, write_kv
from scalellm.kernels.attention.step import AttentionStep, plan_attention

__all__ = [
    "AttentionStep",
    "HeadNorm",
    "Heads",
    "KVCache",
    "KVGeometry",
    "LayerCache",
    "PackedKVCache",
    "PackedLayerCache",
    "PackedStep",
    "PagedArrays",
    "PagedStep",
    "attention",
    "paged_attention",
    "plan_attention",
    "plan_pages",
    "write_kv",
]


def attention(
    qkv: Tensor,
    heads: Heads,
    angles: Tensor,
    cache: LayerCache | PackedLayerCache,
    step: AttentionStep | PackedStep | PagedStep,
) -> Tensor:
    """Normalise, turn, store the step's keys and values, attend.

    `qkv` [T, (heads + 2 kv heads) * head_dim], which may be overwritten; `angles` [T, r] fp32: cos,
    then sin. Returns [T, heads * head_dim].
    """
    if isinstance(cache, PackedLayerCache) and isinstance(step, PackedStep):
        return cpu.attention(qkv, heads, angles, cache, step)
    if isinstance(cache, LayerCache) and isinstance(step, AttentionStep):
        return reference.attention(qkv, heads, angles, cache, step)
    if isinstance(cache, LayerCache) and isinstance(step, PagedStep):
        from scalellm.kernels.attention import triton

        return triton.attention(qkv, heads, angles, cache, step)
    raise TypeError(f"a step planned as {type(step).__name__} over a {type(cache).__name__}")
