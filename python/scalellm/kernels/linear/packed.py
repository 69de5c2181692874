"""Matrices in the layout of the CPU's kernels."""

from dataclasses import dataclass

from torch import Tensor

from scalellm import _core

FORMATS = ("bf16", "int8", "int4")
INT4_GROUP = 32  # weights along k that share a scale


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """How a matrix [n, k] is packed; crates/cpu-kernels/src/linear draws it.

    `groups`: runs of k whose activations have a scale of their own, 1, or 8 where devices divide k.
    `gated`: its rows are gate rows, then as many up rows.
    """

    format: str  # one of FORMATS
    n: int
    k: int
    groups: int = 1
    gated: bool = False

    @property
    def code(self) -> list[int]:
        """The layout as the operators of cpu.py take it."""
        return [FORMATS.index(self.format), INT4_GROUP, self.n, self.k, self.groups, self.gated]

    @property
    def num_bytes(self) -> int:
        """Raises ValueError for a layout that the kernels do not have."""
        return _core.cpu_matrix_bytes(self.code)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    layout: MatrixLayout
    data: Tensor  # uint8 [layout.num_bytes], aligned to 64 bytes
