"""Lays a model's matrices out for the CPU's kernels as they are loaded, quantised if asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix, MatrixLayout
from scalellm.kernels.linear.cpu import pack, pack_int8
from scalellm.kernels.linear.packed import INT4_GROUP
from scalellm.layers.shard import GROUPS, Shard
from scalellm.layers.weights import MatrixSpec, Use, WeightSource
from scalellm.loader.checkpoint import CheckpointSource

FORMAT_OF = {"none": "bf16", "int8": "int8", "int4": "int4"}
# Inputs that the kernels take at once, of which a group has whole ones.
_UNITS = {"bf16": 2, "int8": 4, "int4": INT4_GROUP}


@dataclass(frozen=True, slots=True)
class Packing:
    """How each kind of matrix is stored; `quantization` is a key of FORMAT_OF."""

    quantization: str

    def layout(self, spec: MatrixSpec) -> MatrixLayout:
        """A router stays bf16: it is small, and a flipped choice of expert costs much."""
        format = "bf16" if spec.use is Use.ROUTER else FORMAT_OF[self.quantization]
        groups = 1
        if spec.use is Use.ROW:
            groups = GROUPS if spec.k % (GROUPS * _UNITS[format]) == 0 else 1
        return MatrixLayout(format, spec.n, spec.k, groups, spec.use is Use.GATED)

    @property
    def group_unit(self) -> int:
        """Inputs of which a row-parallel layer's groups have whole ones."""
        return _UNITS[FORMAT_OF[self.quantization]]


class PackingSource:
    """A WeightSource that packs the matrices which another one gives."""

    def __init__(self, source: WeightSource, packing: Packing) -> None:
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self.shard: Shard = source.shard
        self._source = source
        self._packing = packing

    def fill(self, out: Tensor, name: str) -> None:
        self._source.fill(out, name)

    def table(self, name: str, n: int, d: int) -> Tensor:
        return self._source.table(name, n, d)

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        layout = self._packing.layout(spec)
        if layout.format == "int8" and tied is None and isinstance(self._source, CheckpointSource):
            as_it_is = self._source.int8(spec)
            if as_it_is is not None:
                return pack_int8(*as_it_is, layout)
        plain = self._source.matrix(spec, tied)
        if not isinstance(plain, Tensor):
            return plain
        return pack(plain, layout)
