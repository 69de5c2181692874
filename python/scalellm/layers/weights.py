"""Where layers get their weights from.

A layer asks for its tensors by their checkpoint name while it is made. What answers decides what
happens: the loader's checkpoint copies from files, its dummy draws random numbers, its packer lays
matrices out for the CPU's kernels, and its inventory only takes notes, on torch's meta device, to
know a model's tensors and size before memory is spent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix
from scalellm.layers.shard import WHOLE, Shard


class Use(Enum):
    """What a matrix does in its layer; it decides how the matrix is packed and divided."""

    COLUMN = "column"  # devices divide its outputs
    ROW = "row"  # devices divide its inputs: what a COLUMN or GATED one before it put out
    GATED = "gated"  # gate rows, then as many up rows: silu(gate x) * (up x)
    OUTPUT = "output"  # hidden state to logits
    ROUTER = "router"  # hidden state to experts: small, and every device has it whole


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """One matrix [n, k] made of checkpoint matrices stacked along their outputs."""

    parts: tuple[tuple[str, int], ...]  # (name without ".weight", outputs) in their order
    k: int
    use: Use
    heads: tuple[int, ...] = ()  # of each part, where ranks divide heads
    divided: bool = True  # by ranks, if there are several; not if they divide experts

    @property
    def n(self) -> int:
        return sum(outputs for _, outputs in self.parts)

    def parts_of(self, shard: Shard) -> Iterator["Slice"]:
        """What a rank has of each checkpoint matrix, where it is not the CPU's kernels' part."""
        columns = range(self.k)
        if self.divided and self.use is Use.ROW:
            columns = shard.columns(self.k)
        first = 0
        for name, outputs in self.parts:
            for rows in self.rows_of(shard):
                here = range(max(rows.start, first), min(rows.stop, first + outputs))
                if here:
                    part = range(here.start - first, here.stop - first)
                    yield Slice(name, (outputs, self.k), part, columns)
            first += outputs

    def rows_of(self, shard: Shard) -> list[range]:
        """Which of the n rows a rank has; all, where its groups divide k instead."""
        if not self.divided or self.use in (Use.ROW, Use.ROUTER):
            return [range(self.n)]
        if self.use is Use.OUTPUT:
            bounds = shard.id_bounds(self.n)
            return [range(bounds[shard.rank], bounds[shard.rank + 1])]
        rows, first = [], 0
        for index, (_, outputs) in enumerate(self.parts):
            if self.heads:
                width = outputs // self.heads[index]
                heads = shard.heads(self.heads[index])
                rows.append(range(first + heads.start * width, first + heads.stop * width))
            else:
                columns = shard.columns(outputs)
                rows.append(range(first + columns.start, first + columns.stop))
            first += outputs
        return rows


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows and columns of a checkpoint's matrix."""

    name: str  # of the matrix, without ".weight"
    whole: tuple[int, int]  # the matrix's shape
    rows: range
    columns: range

    def of(self, whole: Tensor) -> Tensor:
        """This part of the matrix, a view."""
        rows, columns = self.rows, self.columns
        return whole[rows.start : rows.stop, columns.start : columns.stop]


class WeightSource(Protocol):
    """Gives tensors of one dtype on one device."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def shard(self) -> Shard:
        """What of each matrix `matrix` gives; `fill` and `table` give whole tensors."""

    def fill(self, out: Tensor, name: str) -> None:
        """Write the tensor `name`, of exactly out's shape, into `out`."""

    def table(self, name: str, n: int, d: int) -> Tensor:
        """The tensor `name` [n, d], of which rows are read; perhaps mapped, never written."""

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        """The shard's part of the matrix that `spec` describes, as its kernel wants it.

        `tied`: it is this one, already in memory, and its names may be in no checkpoint.
        """


class PlainMatrices(ABC):
    """Gives every matrix, or a shard's part of it, as one tensor [n, k], filled part by part."""

    dtype: torch.dtype
    device: torch.device
    shard: Shard = WHOLE

    @abstractmethod
    def fill(self, out: Tensor, name: str) -> None:
        """As of WeightSource."""

    @abstractmethod
    def fill_slice(self, out: Tensor, part: Slice) -> None:
        """Write the part's numbers, and read no others where that can be."""

    def table(self, name: str, n: int, d: int) -> Tensor:
        """The rows of the shard's ids."""
        spec = MatrixSpec(((name.removesuffix(".weight"), n),), d, Use.OUTPUT)
        return self._filled(list(spec.parts_of(self.shard)))

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        return self._filled(list(spec.parts_of(self.shard))) if tied is None else tied

    def _filled(self, parts: Sequence[Slice]) -> Tensor:
        """The parts, one below the other."""
        rows, columns = sum(len(part.rows) for part in parts), len(parts[0].columns)
        weight = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        first = 0
        for part in parts:
            self.fill_slice(weight[first : first + len(part.rows)], part)
            first += len(part.rows)
        return weight


def take(source: WeightSource, name: str, *shape: int) -> Tensor:
    """The tensor `name` in memory of its own."""
    out = torch.empty(shape, dtype=source.dtype, device=source.device)
    source.fill(out, name)
    return out
