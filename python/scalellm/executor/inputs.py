"""From a Batch to the tensors of a step, once for all layers."""

import numpy as np
import torch
from torch import Tensor

from scalellm.executor.batch import Batch
from scalellm.kernels.attention import KVCache, KVGeometry, PackedKVCache, pack_step, plan_attention
from scalellm.kernels.attention.step import SpanLayout
from scalellm.layers.step import Step


def build_step(
    batch: Batch,
    cache: KVCache | PackedKVCache,
    geometry: KVGeometry,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Step]:
    """Token ids [T] int64 and the step of a batch of at least one token.

    Raises ValueError for a span that its block table does not cover or that asks for more logits
    than it computes: a scheduler's mistake that would otherwise spoil other sequences' cache.
    """
    layouts, ids, positions, rows = [], [], [], []
    first = 0
    for span in batch.spans:
        count = len(span.token_ids)
        table = np.asarray(span.block_table, dtype=np.int64)
        if not count or span.start < 0 or not 0 <= span.num_logits <= count:
            raise ValueError(f"span of {count} tokens from {span.start}, {span.num_logits} logits")
        if len(table) * cache.block_size < span.start + count:
            raise ValueError(f"{len(table)} blocks do not cover {span.start + count} tokens")
        layouts.append(SpanLayout(first, span.start, count, table))
        ids.append(np.asarray(span.token_ids, dtype=np.int64))
        positions.append(np.arange(span.start, span.start + count, dtype=np.int64))
        rows.append(np.arange(first + count - span.num_logits, first + count, dtype=np.int64))
        first += count
    tables = np.concatenate([layout.block_table for layout in layouts])
    if tables.min() < 0 or tables.max() >= cache.num_blocks:
        raise ValueError(f"block tables name blocks outside 0 .. {cache.num_blocks - 1}")
    step = Step(
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        cache=cache,
        attention=pack_step(layouts)
        if isinstance(cache, PackedKVCache)
        else plan_attention(
            layouts, geometry, cache.block_size, dtype, device, cache.layers[0].keys.dtype
        ),
        logit_rows=torch.from_numpy(np.concatenate(rows)).to(device),
    )
    return torch.from_numpy(np.concatenate(ids)).to(device), step
