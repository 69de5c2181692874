"""Rows of fp8 numbers and their scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
GROUP = 128  # numbers along k that share a scale, where rows have several


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """x[t, i] = data[t, i] * scales[t, i // GROUP], or scales[t, 0] where a row has but one."""

    data: Tensor  # [T, k] FP8
    scales: Tensor  # [T, 1] or [T, ceil(k / GROUP)] fp32
    dtype: torch.dtype = torch.bfloat16  # that the model computes in
    plain: Tensor | None = None  # [T, k], where something else wants them as they were

    @property
    def grouped(self) -> bool:
        return self.scales.shape[1] > 1

    def dequantised(self) -> Tensor:
        """[T, k] fp32."""
        k = self.data.shape[1]
        scales = self.scales.repeat_interleave(GROUP, 1)[:, :k] if self.grouped else self.scales
        return self.data.float() * scales


# What a linear layer is given: rows, or what a GPU's kernels made of them.
Activations = Tensor | Fp8Rows


def plain_rows(x: Activations) -> Tensor:
    """Rows as they were before they became fp8. Raises ValueError where these were not kept."""
    if isinstance(x, Tensor):
        return x
    if x.plain is None:
        raise ValueError("fp8 activations for weights that are not fp8")
    return x.plain
