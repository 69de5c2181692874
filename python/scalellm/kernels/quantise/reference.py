"""Rows to fp8 in torch."""

from torch import Tensor

from scalellm.kernels.quantise.rows import FP8, FP8_LARGEST, Fp8Rows

LEAST_SCALE = 1e-12  # of a row of zeros


def quantise_rows(x: Tensor) -> Fp8Rows:
    """`x` [T, k]; each row's largest number becomes FP8_LARGEST."""
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) / FP8_LARGEST).clamp_(min=LEAST_SCALE)
    return Fp8Rows((wide / scales).to(FP8), scales, x.dtype)
