"""RMSNorm: scale each row to unit root mean square, times a learned weight."""

import torch
from torch import Tensor

from scalellm.kernels import device
from scalellm.kernels.quantise import Activations
from scalellm.kernels.rms_norm import cpu, reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis; `x` [..., d], `weight` [d]."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dim() == 2 and x.stride(1) == 1:
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, fp8: bool
) -> tuple[Tensor, Activations]:
    """x + delta [T, d] (x where there is none), and its norm: in fp8 too, for weights in `fp8` that
    a GPU multiplies."""
    if device.on_gpu(x):
        from scalellm.kernels.rms_norm import triton

        if delta is None:
            return x, triton.rms_norm(x, weight, eps, fp8)
        return triton.add_rms_norm(x, delta, weight, eps, fp8)
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)
