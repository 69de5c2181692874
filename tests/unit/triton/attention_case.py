"""One layer's step over a paged cache, for torch and for a GPU's kernels."""

import numpy as np
import torch

from scalellm.kernels.attention import Heads, KVCache, KVGeometry, reference
from scalellm.kernels.attention.paged import plan_pages
from scalellm.kernels.attention.step import SpanLayout, plan_attention


class Case:
    """One layer's step, planned for both."""

    def __init__(self, numbers, where, spans, heads: Heads, block_size=4, dtype=torch.float32):
        self.heads, self.where = heads, where
        kv, dim = heads.num_kv_heads, heads.head_dim
        geometry = KVGeometry(1, kv, dim, dim, (heads.window,))
        lengths = [-(-(start + count) // block_size) for start, count in spans]
        total = sum(lengths) + 2
        blocks = np.random.default_rng(3).permutation(total)[: sum(lengths)]
        self.caches = []
        for _ in range(2):
            cache = KVCache.allocate(geometry, total, block_size, dtype, where)
            self.caches.append(cache.layers[0])
        for part in ("keys", "values"):
            past = numbers(total, kv, block_size, dim)
            for cache in self.caches:
                getattr(cache, part).copy_(past)
        rows, layouts, first = [], [], 0
        for (start, count), end in zip(spans, np.cumsum(lengths), strict=True):
            table = blocks[end - lengths[len(rows)] : end]
            layouts.append(SpanLayout(first, start, count, table))
            rows.append((first, start, count, end - lengths[len(rows)]))
            first += count
        self.planned = plan_attention(layouts, geometry, block_size, dtype, where)
        self.arrays = np.array(rows), blocks.astype(np.int32), block_size
        self.step = plan_pages(*self.arrays).to(where)
        self.qkv = numbers(first, (heads.num_heads + 2 * kv) * dim, dtype=dtype)
        angle = numbers(first, heads.head_dim // 2)
        self.angles = torch.cat([angle.cos(), angle.sin()], -1)

    def check(self, tolerance=1e-4):
        from scalellm.kernels.attention import triton

        expected = reference.attention(
            self.qkv, self.heads, self.angles, self.caches[0], self.planned
        )
        found = triton.attention(self.qkv, self.heads, self.angles, self.caches[1], self.step)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        for span in self.planned_rows():
            keys = [cache.keys.view(-1, self.heads.head_dim)[span] for cache in self.caches]
            torch.testing.assert_close(*keys, atol=tolerance, rtol=tolerance)
            values = [cache.values.view(-1, self.heads.head_dim)[span] for cache in self.caches]
            torch.testing.assert_close(*values)

    def planned_rows(self):
        return [self.planned.write]
