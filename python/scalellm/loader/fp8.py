"""A model's matrices in fp8 on a GPU: as the checkpoint has them, or quantised as they arrive."""

import torch
from torch import Tensor

from scalellm.kernels.linear import Matrix
from scalellm.kernels.linear.fp8 import quantise_matrix
from scalellm.layers.shard import Shard
from scalellm.layers.weights import MatrixSpec, Use, WeightSource
from scalellm.loader.checkpoint import CheckpointSource

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
    """A WeightSource of fp8 matrices; quantises those that another one gives in another type."""

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
        if becomes_fp8(spec, tied) and isinstance(self._source, CheckpointSource):
            as_it_is = self._source.fp8(spec)
            if as_it_is is not None:
                return as_it_is
        plain = self._source.matrix(spec, tied)
        if isinstance(plain, Tensor) and becomes_fp8(spec, tied):
            return quantise_matrix(plain)
        return plain
