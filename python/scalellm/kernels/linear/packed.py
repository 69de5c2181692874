"""Matrices in the layout of the CPU's kernels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalellm import _core

INT4_ZEROS = "int4-zeros"  # int4 that is no rounding of ours: with a zero beside each scale
FORMATS = ("bf16", "int8", "int4", INT4_ZEROS)
INT4_GROUP = 32  # weights along k that share a scale, where we choose
INT4_GROUPS = (128, 64, 32)  # as many as can share one
_PANEL = 32  # rows that lie together; of a gated matrix 16 of the gate and 16 of the up rows


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """How a matrix [n, k] is packed; crates/cpu-kernels/src/linear draws it.

    `groups`: runs of k whose activations have a scale of their own, 1, or 8 where devices divide k.
    `gated`: its rows are gate rows, then as many up rows.
    `scale_group`: weights along k that share a scale of int4, one of INT4_GROUPS.
    """

    format: str  # one of FORMATS
    n: int
    k: int
    groups: int = 1
    gated: bool = False
    scale_group: int = INT4_GROUP

    @property
    def code(self) -> list[int]:
        """The layout as the operators of cpu.py take it."""
        format = FORMATS.index(self.format)
        return [format, self.scale_group, self.n, self.k, self.groups, self.gated]

    @property
    def num_bytes(self) -> int:
        """Raises ValueError for a layout that the kernels do not have."""
        return _core.cpu_matrix_bytes(self.code)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    layout: MatrixLayout
    data: Tensor  # uint8 [layout.num_bytes], aligned to 64 bytes

    def of_groups(self, groups: range) -> "PackedMatrix":
        """A row-parallel part: a view."""
        all_groups, k = self.layout.groups, self.layout.k
        layout = replace(self.layout, k=k * len(groups) // all_groups, groups=len(groups))
        each = self.data.numel() // all_groups
        return PackedMatrix(layout, self.data[groups.start * each : groups.stop * each])

    def of_rows(self, rows: Sequence[range]) -> "PackedMatrix":
        """A column-parallel part; of a gated matrix those of the gate, then of the up rows. A view
        where they are whole panels, else a copy."""
        layout = replace(self.layout, n=sum(map(len, rows)))
        width, columns = _PANEL, self.layout.n
        if layout.gated:
            width, columns = width // 2, columns // 2
        part = rows[0]
        end_fits = part.stop % width == 0 or part.stop == columns
        if len(rows) == 1 + layout.gated and part.start % width == 0 and end_fits:
            each = self.data.numel() // -(-self.layout.n // _PANEL)
            first, last = part.start // width, -(-part.stop // width)
            return PackedMatrix(layout, self.data[first * each : last * each])
        data = aligned_bytes(layout.num_bytes)
        _core.cpu_matrix_select(
            self.layout.code,
            (self.data.data_ptr(), self.data.numel()),
            [(part.start, part.stop) for part in rows],
            (data.data_ptr(), data.numel()),
        )
        return PackedMatrix(layout, data)

    def copy(self) -> "PackedMatrix":
        """The same in memory of its own."""
        return PackedMatrix(self.layout, aligned_bytes(self.data.numel()).copy_(self.data))


def aligned_bytes(count: int) -> Tensor:
    """uint8 [count] whose first byte is at a multiple of 64."""
    held = torch.empty(count + 63, dtype=torch.uint8)
    first = -held.data_ptr() % 64
    return held[first : first + count]
