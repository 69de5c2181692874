"""Weight sources that need no files: one that takes notes, one that draws random numbers."""

import zlib

import torch
from torch import Tensor

_POOL = 4_194_301  # a prime, so that rows of a matrix never line up with the pool


class InventorySource:
    """A WeightSource on the meta device that records what a model asks for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = torch.device("meta")
        self.shapes: dict[str, tuple[int, ...]] = {}

    def fill(self, out: Tensor, name: str) -> None:
        self.shapes[name] = tuple(out.shape)

    @property
    def bytes(self) -> int:
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return numbers * self.dtype.itemsize


class DummySource:
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
