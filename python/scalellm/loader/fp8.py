"""Quantises a model's matrices to fp8 as they arrive on a GPU."""

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix
from scalellm.kernels.linear.fp8 import quantise_matrix
from scalellm.layers.shard import Shard
from scalellm.layers.weights import MatrixSpec, Use, WeightSource

LEAST_CAPABILITY = (8, 9)  # compute capability whose tensor cores multiply E4M3: Ada, Hopper, later


def becomes_fp8(spec: MatrixSpec, tied: Tensor | None) -> bool:
    """Not a router's, since a flipped choice of expert costs much, nor the output layer's."""
    return tied is None and spec.use not in (Use.ROUTER, Use.OUTPUT)


def fp8_bytes(spec: MatrixSpec) -> int:
    return spec.n * spec.k + 4 * spec.n


def fp8_obstacle(device: torch.device, family: str, dtype: torch.dtype) -> str | None:
    """Why fp8 cannot be had, as the end of a sentence that begins with the flag; None if it can."""
    if device.type != "cuda":
        return f"runs on a GPU, and the model is on {device.type}; int8 is there for a CPU"
    if family == "transformers":
        return "has no kernels for a model that transformers' code runs"
    if dtype != torch.bfloat16:
        return f"needs --dtype bfloat16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"needs a GPU of compute capability {least} (Ada, Hopper), not {found}"
    return None


class Fp8Source:
    """A WeightSource that quantises the matrices which another one gives."""

    def __init__(self, source: WeightSource) -> None:
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self.shard: Shard = source.shard
        self._source = source

    def fill(self, out: Tensor, name: str) -> None:
        self._source.fill(out, name)

    def table(self, name: str, n: int, d: int) -> Tensor:
        return self._source.table(name, n, d)

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        plain = self._source.matrix(spec, tied)
        if isinstance(plain, Tensor) and becomes_fp8(spec, tied):
            return quantise_matrix(plain)
        return plain
