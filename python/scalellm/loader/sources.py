"""Weight sources that need no files: one that takes notes, one that draws random numbers."""

import zlib

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix
from scalellm.layers.shard import WHOLE, Shard
from scalellm.layers.weights import MatrixSpec, PlainMatrices, Slice
from scalellm.loader.fp8 import becomes_fp8, fp8_bytes
from scalellm.loader.packed_file import MatrixPart, Part, TensorPart
from scalellm.loader.packing import Packing

_POOL = 4_194_301  # a prime, so that rows of a matrix never line up with the pool


class InventorySource:
    """A WeightSource on the meta device that records what a model asks for.

    `packing`: how its matrices will be laid out; as they are if None, or in fp8.
    """

    shard = WHOLE

    def __init__(
        self, dtype: torch.dtype, packing: Packing | None = None, fp8: bool = False
    ) -> None:
        self.dtype = dtype
        self.device = torch.device("meta")
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the checkpoint's tensors
        self.plan: list[Part] = []  # of packed weights, in the model's order
        self.bytes = 0
        self._packing = packing
        self._fp8 = fp8
        self._tables: list[tuple[str, Tensor]] = []

    def fill(self, out: Tensor, name: str) -> None:
        self._take(TensorPart(name, tuple(out.shape), self.dtype))

    def table(self, name: str, n: int, d: int) -> Tensor:
        self._take(TensorPart(name, (n, d), self.dtype))
        table = torch.empty(n, d, dtype=self.dtype, device=self.device)
        self._tables.append((name, table))
        return table

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        if tied is None:
            for name, outputs in spec.parts:
                self.shapes[f"{name}.weight"] = (outputs, spec.k)
        if self._packing is not None:
            twin = next((name for name, table in self._tables if table is tied), None)
            part = MatrixPart(spec, self._packing.layout(spec), twin)
            self.plan.append(part)
            self.bytes += part.num_bytes
        elif self._fp8 and becomes_fp8(spec, tied):
            self.bytes += fp8_bytes(spec)
        elif tied is None:
            self.bytes += spec.n * spec.k * self.dtype.itemsize
        return torch.empty(spec.n, spec.k, dtype=self.dtype, device=self.device)

    def _take(self, part: TensorPart) -> None:
        self.shapes[part.name] = part.shape
        self.plan.append(part)
        self.bytes += part.num_bytes


class DummySource(PlainMatrices):
    """A WeightSource of random numbers, equal for equal seeds whatever is asked for first.

    Matrices are normal with deviation 1 / sqrt(columns), which keeps activations and logits near
    unit size; norms are one and biases zero. The numbers come from one pool, read from a place that
    the tensor's name decides, so that filling goes at the speed of memory.
    """

    def __init__(
        self, seed: int, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.shard = shard
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL, generator=generator).to(device)

    def fill(self, out: Tensor, name: str) -> None:
        if out.dim() < 2:
            out.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        flat = out.view(-1)
        first = zlib.crc32(f"{self._seed} {name}".encode()) % _POOL
        done = 0
        while done < len(flat):
            count = min(_POOL - first, len(flat) - done)
            flat[done : done + count].copy_(self._pool[first : first + count])
            done, first = done + count, 0
        out.mul_(out.shape[-1] ** -0.5)

    def fill_slice(self, out: Tensor, part: Slice) -> None:
        name = f"{part.name}.weight"
        if out.shape == part.whole:
            self.fill(out, name)
        else:
            whole = torch.empty(part.whole, dtype=self.dtype, device=self.device)
            self.fill(whole, name)
            out.copy_(part.of(whole))
