"""Weights in fp8 (E4M3), as GPUs multiply them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels.quantise import FP8, FP8_LARGEST, GROUP

_LEAST_SCALE = 1e-12  # of weights that are all zero


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix [n, k], or one for each of E experts [E, n, k].

    A scale for each output, `scales` [..., n, 1], or for each block of GROUP x GROUP weights,
    [..., ceil(n / GROUP), ceil(k / GROUP)]; both fp32.
    """

    data: Tensor  # FP8
    scales: Tensor

    @property
    def blocked(self) -> bool:
        return self.scales.shape[-1] > 1 or self.scales.shape[-2] < self.data.shape[-2]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales
        if self.blocked:
            n, k = self.data.shape[-2:]
            scales = scales.repeat_interleave(GROUP, -2).repeat_interleave(GROUP, -1)[..., :n, :k]
        return (self.data.float() * scales).to(dtype)


def quantise_matrix(weight: Tensor) -> Fp8Matrix:
    """`weight` [n, k] with a scale for each output, its largest weight's."""
    wide = weight.float()
    scales = (wide.abs().amax(-1, keepdim=True) / FP8_LARGEST).clamp_(min=_LEAST_SCALE)
    return Fp8Matrix((wide / scales).to(FP8), scales)


# Matrices [n, k] of E experts as one [E, n, k].
Stacked = Tensor | Fp8Matrix


def unstack(matrices: Stacked) -> list[Tensor] | list[Fp8Matrix]:
    """The matrices of one [E, n, k], without copying them."""
    if isinstance(matrices, Tensor):
        return list(matrices)
    pairs = zip(matrices.data, matrices.scales, strict=True)
    return [Fp8Matrix(data, scales) for data, scales in pairs]


def stack(matrices: Sequence[Tensor] | Sequence[Fp8Matrix]) -> Stacked:
    """Matrices of one shape as one [E, n, k]."""
    plain = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    if plain:
        return torch.stack(plain)
    fp8 = [matrix for matrix in matrices if isinstance(matrix, Fp8Matrix)]
    return Fp8Matrix(
        torch.stack([matrix.data for matrix in fp8]), torch.stack([matrix.scales for matrix in fp8])
    )
