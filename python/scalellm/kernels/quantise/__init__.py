"""Activations in fp8 (E4M3), scaled as they come."""

from torch import Tensor

from scalellm.kernels import device
from scalellm.kernels.quantise import reference
from scalellm.kernels.quantise.rows import (
    FP8,
    FP8_LARGEST,
    GROUP,
    Activations,
    Fp8Rows,
    plain_rows,
)

__all__ = [
    "FP8",
    "FP8_LARGEST",
    "GROUP",
    "Activations",
    "Fp8Rows",
    "plain_rows",
    "quantise_rows",
]


def quantise_rows(x: Tensor) -> Fp8Rows:
    """`x` [T, k] to fp8 with one scale for each row."""
    if device.on_gpu(x):
        from scalellm.kernels.quantise import triton

        return triton.quantise_rows(x)
    return reference.quantise_rows(x)
