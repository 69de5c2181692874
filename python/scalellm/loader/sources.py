"""Weight sources that need no files: one that takes notes, one that draws random numbers."""

import zlib

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix
from scalellm.layers.weights import MatrixSpec, PlainMatrices
from scalellm.loader.packing import Packing

_POOL = 4_194_301  # a prime, so that rows of a matrix never line up with the pool


class InventorySource(PlainMatrices):
    """A WeightSource on the meta device that records what a model asks for.

    `packing`: how its matrices will be laid out; as they are if None.
    """

    def __init__(self, dtype: torch.dtype, packing: Packing | None = None) -> None:
        self.dtype = dtype
        self.device = torch.device("meta")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._packing = packing
        self._saved_bytes = 0  # by packing; less than none where a matrix is held twice

    def fill(self, out: Tensor, name: str) -> None:
        self.shapes[name] = tuple(out.shape)

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        if self._packing is not None:
            plain_bytes = 0 if tied is not None else spec.n * spec.k * self.dtype.itemsize
            self._saved_bytes += plain_bytes - self._packing.layout(spec).num_bytes
        return super().matrix(spec, tied)

    @property
    def bytes(self) -> int:
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return numbers * self.dtype.itemsize - self._saved_bytes


class DummySource(PlainMatrices):
    """A WeightSource of random numbers, equal for equal seeds whatever is asked for first.

    Matrices are normal with deviation 1 / sqrt(columns), which keeps activations and logits near
    unit size; norms are one and biases zero. The numbers come from one pool, read from a place that
    the tensor's name decides, so that filling goes at the speed of memory.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL, generator=generator)

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
