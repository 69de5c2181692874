"""From a Batch to the arrays of a step, once for all layers."""

from array import array
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.executor.batch import Batch
from scalellm.kernels.attention import (
    KVCache,
    KVGeometry,
    PackedKVCache,
    PackedStep,
    plan_attention,
)
from scalellm.kernels.attention.step import SpanLayout
from scalellm.layers.step import Step

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """T tokens of S spans, L of which give logits; all int64 but `tables`."""

    token_ids: Ints  # [T]
    positions: Ints  # [T]
    logit_rows: Ints  # [L]
    spans: Ints  # [S, 4]: first row, start, count, where its blocks begin in `tables`
    tables: npt.NDArray[np.int32]  # all block tables, one after the other

    @classmethod
    def nothing(cls) -> Self:
        """A step of no tokens."""
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, none, none.reshape(0, 4), none.astype(np.int32))


def build_arrays(batch: Batch, block_size: int, num_blocks: int) -> StepArrays:
    """The arrays of a batch of at least one token.

    Raises ValueError for a span that its block table does not cover or that asks for more logits
    than it computes: a scheduler's mistake that would otherwise spoil other sequences' cache.
    """
    ids, positions, logit_rows = array("q"), array("q"), array("q")
    spans, blocks = array("q"), array("i")
    first = 0
    # Plain Python: after a step's kernels everything is out of the caches, numpy's code too, and a
    # dozen of its calls cost more than this loop over 64 sequences.
    for token_ids, start, table, num_logits, _, _ in batch.spans:
        count, length = len(token_ids), len(table)
        if count < 1 or start < 0 or not 0 <= num_logits <= count:
            raise ValueError(f"span of {count} tokens from {start}, {num_logits} logits")
        if length * block_size < start + count:
            raise ValueError(f"{length} blocks do not cover {start + count} tokens")
        spans.extend((first, start, count, len(blocks)))
        ids.extend(token_ids)
        positions.extend(range(start, start + count))
        blocks.extend(table)
        first += count
        logit_rows.extend(range(first - num_logits, first))
    tables = np.asarray(blocks)
    if tables.min() < 0 or tables.max() >= num_blocks:
        raise ValueError(f"block tables name blocks outside 0 .. {num_blocks - 1}")
    return StepArrays(
        token_ids=np.asarray(ids),
        positions=np.asarray(positions),
        logit_rows=np.asarray(logit_rows),
        spans=np.asarray(spans).reshape(-1, 4),
        tables=tables,
    )


def build_step(
    arrays: StepArrays,
    cache: KVCache | PackedKVCache,
    geometry: KVGeometry,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Step]:
    """Token ids [T] int64 and the step, as models take them."""
    attention = (
        PackedStep(torch.from_numpy(arrays.spans), torch.from_numpy(arrays.tables))
        if isinstance(cache, PackedKVCache)
        else plan_attention(
            _layouts(arrays),
            geometry,
            cache.block_size,
            dtype,
            device,
            cache.layers[0].keys.dtype,
        )
    )
    step = Step(
        positions=torch.from_numpy(arrays.positions).to(device),
        cache=cache,
        attention=attention,
        logit_rows=torch.from_numpy(arrays.logit_rows).to(device),
    )
    return torch.from_numpy(arrays.token_ids).to(device), step


def _layouts(arrays: StepArrays) -> list[SpanLayout]:
    tables = np.split(arrays.tables.astype(np.int64), arrays.spans[1:, 3])
    return [
        SpanLayout(first, start, count, table)
        for (first, start, count, _), table in zip(arrays.spans.tolist(), tables, strict=True)
    ]
