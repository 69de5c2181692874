"""Attention over a paged KV cache.

cache.py lays the memory out, step.py plans a step, reference.py computes it.
"""

from scalellm.kernels.attention.cache import KVCache, KVGeometry, LayerCache
from scalellm.kernels.attention.reference import paged_attention, write_kv
from scalellm.kernels.attention.step import AttentionStep, plan_attention

__all__ = [
    "AttentionStep",
    "KVCache",
    "KVGeometry",
    "LayerCache",
    "paged_attention",
    "plan_attention",
    "write_kv",
]
