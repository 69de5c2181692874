"""The plan of a step as the GPU's kernels want it: one array, copied to the device at once.

    spans    row of the batch, first position, tokens     of each sequence in the step
    tables   its blocks, padded to the longest            [spans, width]
    decodes  spans of one token                           one program each, kv head and split
    tiles    (span, first of its tokens)                  PREFILL_TILE queries of the other spans
    slots    row of the cache that each token is stored in, -1 for none

A recorded decode step keeps these arrays and their sizes; spans of no tokens fill them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.kernels.attention.cache import LayerCache
from scalellm.kernels.attention.heads import Heads

Ints = npt.NDArray[np.int32]

PREFILL_TILE = 64  # queries of one sequence that a program attends with


class Prompts(Protocol):
    """Computes the spans of several tokens in place of Triton's kernel."""

    def run(self, query: Tensor, heads: Heads, cache: LayerCache, out: Tensor) -> None:
        """Of their rows of `query` [T, heads, head_dim], into `out`."""


@dataclass(frozen=True, slots=True)
class PagedStep:
    """All int32, on the device."""

    spans: Tensor  # [S, 3]
    tables: Tensor  # [S, W]
    decodes: Tensor  # [D]
    tiles: Tensor  # [P, 2]
    slots: Tensor  # [T]
    prompts: Prompts | None = None

    @classmethod
    def of(cls, arrays: Sequence[Tensor], prompts: Prompts | None = None) -> Self:
        """Of `PagedArrays.all`, once they are on the device."""
        spans, tables, decodes, tiles, slots = arrays
        return cls(spans, tables, decodes, tiles, slots, prompts)


@dataclass(frozen=True, slots=True)
class PagedArrays:
    """The same on the host."""

    spans: Ints
    tables: Ints
    decodes: Ints
    tiles: Ints
    slots: Ints

    @property
    def all(self) -> tuple[Ints, ...]:
        return self.spans, self.tables, self.decodes, self.tiles, self.slots

    def to(self, device: torch.device) -> PagedStep:
        return PagedStep.of([torch.from_numpy(array).to(device) for array in self.all])


def plan_pages(
    spans: npt.NDArray[np.int64], tables: npt.NDArray[np.int32], block_size: int
) -> PagedArrays:
    """Of `spans` [S, 4]: first row, start, count, where its blocks begin in `tables`, as of
    executor.inputs.StepArrays. Rows of the batch are in the order of spans."""
    firsts, starts, counts, begins = spans.T
    ends = np.append(begins[1:], len(tables))
    lengths = ends - begins
    padded = np.zeros((len(spans), lengths.max()), dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = tables
    owner = np.repeat(np.arange(len(spans)), counts)
    positions = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    slots = padded[owner, positions // block_size] * block_size + positions % block_size
    tiles = [
        (span, first)
        for span in np.flatnonzero(counts > 1).tolist()
        for first in range(0, int(counts[span]), PREFILL_TILE)
    ]
    return PagedArrays(
        spans=np.ascontiguousarray(spans[:, :3], dtype=np.int32),
        tables=padded,
        decodes=np.flatnonzero(counts == 1).astype(np.int32),
        tiles=np.array(tiles, dtype=np.int32).reshape(-1, 2),
        slots=slots.astype(np.int32),
    )
