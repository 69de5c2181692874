"""RMSNorm: scale each row to unit root mean square, times a learned weight."""

import torch
from torch import Tensor

from scalellm.kernels.rms_norm import cpu, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis; `x` [..., d], `weight` [d]."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dim() == 2 and x.stride(1) == 1:
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)
