"""One file of packed weights: written once, then mapped by every replica on the host.

    0       magic | length of the index u64 | its place u64 | its BLAKE2b      one page
    4096    part 0 | part 1 | ...         each at a multiple of 4096 bytes, in the plan's order
    place   the index: JSON, every part's name, kind, place, size and CRC-32

A part is a tensor as it is, or a packed matrix, whose whole panels or groups are runs of bytes
(crates/cpu-kernels/src/linear draws them), so that a tensor-parallel slice is a view. The file is
written in whole huge pages, which lets the kernel keep and map it in such. Nothing is synced: after
a power cut the sums tell.
"""

import hashlib
import json
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix, MatrixLayout, PackedMatrix
from scalellm.layers.shard import WHOLE
from scalellm.layers.weights import MatrixSpec, WeightSource

MAGIC = b"scalellm packed\x01"
_HEADER = struct.Struct("<16sQQ32s")
_PAGE = mmap.ALLOCATIONGRANULARITY
_HUGE_PAGE = 2 << 20


class DamagedFileError(Exception):
    """A file that is not, or no longer, what was written."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A tensor that is used as the checkpoint has it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> list[Any]:
        """What the bytes depend on besides the checkpoint, in JSON's types."""
        return [str(self.dtype), *self.shape]


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """A matrix in the layout of the CPU's kernels."""

    spec: MatrixSpec
    layout: MatrixLayout
    tied: str | None  # the tensor part that it is, where it has no tensor of its own

    @property
    def name(self) -> str:
        return matrix_name(self.spec)

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    @property
    def kind(self) -> list[Any]:
        return [*self.layout.code, self.tied]


Part = TensorPart | MatrixPart


def matrix_name(spec: MatrixSpec) -> str:
    return "+".join(name for name, _ in spec.parts)


def file_bytes(plan: Sequence[Part]) -> int:
    """Size of the file, but for its index."""
    return _PAGE + sum(_pages(part.num_bytes) for part in plan)


def write(stream: BinaryIO, plan: Sequence[Part], source: WeightSource) -> None:
    """Pack every part of `plan` as `source` gives it. Raises OSError, and what the source raises.

    `source` packs as the plan says; no more than one part, and tied tables, are in memory at once.
    """
    out = _HugePageWriter(stream)
    out.write(bytes(_PAGE))
    entries = []
    tables = {part.tied for part in plan if isinstance(part, MatrixPart) and part.tied}
    held: dict[str, Tensor] = {}
    for part in plan:
        if isinstance(part, TensorPart):
            tensor = torch.empty(part.shape, dtype=part.dtype)
            source.fill(tensor, part.name)
            if part.name in tables:
                held[part.name] = tensor
            data = tensor.flatten().view(torch.uint8)
        else:
            data = _packed(source.matrix(part.spec, held.get(part.tied or ""))).data
        view = data.numpy().data
        entries.append([part.name, part.kind, out.place, len(view), zlib.crc32(view)])
        out.write(view)
        out.write(bytes(-len(view) % _PAGE))
    index = json.dumps(entries).encode()
    place = out.place
    out.write(index)
    out.flush()
    digest = hashlib.blake2b(index, digest_size=32).digest()
    os.pwrite(stream.fileno(), _HEADER.pack(MAGIC, len(index), place, digest), 0)


class MappedWeights:
    """A WeightSource over a mapped file: read only, in memory that all replicas share.

    Packed matrices are in memory when this is made; of tables, only what is read comes in.
    """

    device = torch.device("cpu")
    shard = WHOLE

    def __init__(
        self, path: Path, plan: Sequence[Part], dtype: torch.dtype, checked: bool = False
    ) -> None:
        """Map and check all of the file, unless it is `checked`: then parts come into memory as
        they are used. Raises DamagedFileError, OSError."""
        self.dtype = dtype
        with path.open("rb") as file:
            places = _read_index(file, plan)
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._bytes = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))
        self._plan = {part.name: part for part in plan}
        self._places = {part.name: place for part, (place, _) in zip(plan, places, strict=True)}
        self._advise_pages(plan, places)
        if not checked:
            self._check(path, plan, places)

    @property
    def num_bytes(self) -> int:
        """Memory that stays in use: the matrices."""
        return sum(p.num_bytes for p in self._plan.values() if isinstance(p, MatrixPart))

    def fill(self, out: Tensor, name: str) -> None:
        out.copy_(self._tensor(name))

    def table(self, name: str, n: int, d: int) -> Tensor:
        return self._tensor(name).view(n, d)

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        part = self._plan[matrix_name(spec)]
        if not isinstance(part, MatrixPart) or (part.tied is None) != (tied is None):
            raise TypeError(f"{part.name} was planned as something else")
        return PackedMatrix(part.layout, self._part(part))

    def _tensor(self, name: str) -> Tensor:
        part = self._plan[name]
        if not isinstance(part, TensorPart):
            raise TypeError(f"{part.name} is packed")
        return self._part(part).view(part.dtype).view(part.shape)

    def _part(self, part: Part) -> Tensor:
        first = self._places[part.name]
        return self._bytes[first : first + part.num_bytes]

    def _check(self, path: Path, plan: Sequence[Part], places: Sequence[tuple[int, int]]) -> None:
        """Sum every part, which also brings it into memory; let go of tensors afterwards."""

        def sound(index: int) -> bool:
            part, (place, crc) = plan[index], places[index]
            right = zlib.crc32(self._part(part).numpy().data) == crc
            if isinstance(part, TensorPart):
                self._advise("MADV_DONTNEED", place, part.num_bytes)
            return right

        with ThreadPoolExecutor(torch.get_num_threads(), "scalellm-check") as threads:
            for part, right in zip(plan, threads.map(sound, range(len(plan))), strict=True):
                if not right:
                    raise DamagedFileError(f"{path}: {part.name} is not what was written")

    def _advise_pages(self, plan: Sequence[Part], places: Sequence[tuple[int, int]]) -> None:
        self._advise("MADV_HUGEPAGE", 0, len(self._map))
        for part, (place, _) in zip(plan, places, strict=True):
            if isinstance(part, TensorPart) and part.num_bytes >= _HUGE_PAGE:
                # A row that is read is to bring in its surroundings, but not two megabytes.
                self._advise("MADV_NOHUGEPAGE", place, part.num_bytes)

    def _advise(self, advice: str, first: int, count: int) -> None:
        """Advice that this system does not know, or refuses, changes nothing but speed."""
        code = getattr(mmap, advice, None)
        if code is not None:
            with suppress(OSError):
                self._map.madvise(code, first, count)


def _packed(matrix: Matrix) -> PackedMatrix:
    if not isinstance(matrix, PackedMatrix):
        raise TypeError("a source of packed weights gave a plain matrix")
    return matrix


def _read_index(file: BinaryIO, plan: Sequence[Part]) -> list[tuple[int, int]]:
    """Place and CRC-32 of each part of `plan`. Raises DamagedFileError."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DamagedFileError(f"{file.name} has no header")
    _, length, place, digest = _HEADER.unpack(header)
    if place + length != size:
        raise DamagedFileError(f"{file.name} has {size} bytes, not {place + length}")
    file.seek(place)
    index = file.read(length)
    if hashlib.blake2b(index, digest_size=32).digest() != digest:
        raise DamagedFileError(f"{file.name}: the index is not what was written")
    entries = json.loads(index)
    expected = [[part.name, part.kind, part.num_bytes] for part in plan]
    if [[name, kind, count] for name, kind, _, count, _ in entries] != expected:
        raise DamagedFileError(f"{file.name} holds other parts than this model has")
    return [(place, crc) for _, _, place, _, crc in entries]


def _pages(count: int) -> int:
    return -(-count // _PAGE) * _PAGE


class _HugePageWriter:
    """Writes pieces that begin at huge pages, so that the page cache is made of such."""

    def __init__(self, stream: BinaryIO) -> None:
        self._descriptor = stream.fileno()
        self._buffer = memoryview(bytearray(4 * _HUGE_PAGE))
        self._filled = 0
        self._written = 0

    @property
    def place(self) -> int:
        """Bytes so far."""
        return self._written + self._filled

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            piece = view[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        rest = self._buffer[: self._filled]
        while rest:
            count = os.pwrite(self._descriptor, rest, self._written)
            self._written += count
            rest = rest[count:]
        self._filled = 0
