"""Lays a model's matrices out for the CPU's kernels as they are loaded, quantised if asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix, MatrixLayout
from scalellm.kernels.linear.cpu import pack, pack_int4, pack_int8
from scalellm.kernels.linear.packed import INT4_GROUP, INT4_GROUPS, INT4_ZEROS
from scalellm.layers.shard import GROUPS, Shard
from scalellm.layers.weights import MatrixSpec, Use, WeightSource
from scalellm.loader.checkpoint import CheckpointSource

FORMAT_OF = {"none": "bf16", "int8": "int8", "int4": "int4"}
# Inputs that the kernels take at once, of which a group has whole ones.
_UNITS = {"bf16": 2, "int8": 4, "int4": INT4_GROUP}


@dataclass(frozen=True, slots=True)
class Packing:
    """How each kind of matrix is stored; `quantization` is a key of FORMAT_OF.

    `int4_groups`: those that stay the int4 numbers which the checkpoint has, where the kernels have
    their groups, by name; and how many inputs share a scale there.
    """

    quantization: str
    int4_groups: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells it from others, for people and for replicas that replay requests."""
        names = (self.quantization, "int4") if self.int4_groups else (self.quantization,)
        return "+".join(sorted(set(names)))

    def layout(self, spec: MatrixSpec) -> MatrixLayout:
        """A router stays bf16: it is small, and a flipped choice of expert costs much."""
        gated = spec.use is Use.GATED
        scale_group = self._scale_group(spec)
        if scale_group is not None:
            groups = GROUPS if spec.use is Use.ROW else 1
            return MatrixLayout(INT4_ZEROS, spec.n, spec.k, groups, gated, scale_group)
        format = "bf16" if spec.use is Use.ROUTER else FORMAT_OF[self.quantization]
        groups = 1
        if spec.use is Use.ROW:
            groups = GROUPS if spec.k % (GROUPS * _UNITS[format]) == 0 else 1
        return MatrixLayout(format, spec.n, spec.k, groups, gated)

    def _scale_group(self, spec: MatrixSpec) -> int | None:
        """The most inputs that share a scale, in the checkpoint and in the kernels; None where its
        numbers cannot stay. Ranks can divide what stays as they can divide what does not."""
        in_parts = {self.int4_groups.get(name) for name, _ in spec.parts}
        group = in_parts.pop() if len(in_parts) == 1 else None
        if group is None or spec.use is Use.ROUTER:
            return None
        if spec.use is Use.ROW:
            if spec.k % (GROUPS * INT4_GROUP):
                return None
            group = gcd(group, spec.k // GROUPS)
        return next((size for size in INT4_GROUPS if group % size == 0), None)

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
        if tied is None and isinstance(self._source, CheckpointSource):
            if layout.format == INT4_ZEROS:
                found = self._source.int4(spec)
                # The kernels' scale groups may be parts of the checkpoint's.
                group = found.group[:: layout.scale_group]
                return pack_int4(
                    found.numbers, found.scales[:, group], found.zeros[:, group], layout
                )
            as_it_is = self._source.int8(spec) if layout.format == "int8" else None
            if as_it_is is not None:
                return pack_int8(*as_it_is, layout)
        plain = self._source.matrix(spec, tied)
        if not isinstance(plain, Tensor):
            return plain
        return pack(plain, layout)
