"""RMSNorm in torch (Zhang and Sennrich, 2019)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis.

    `x` [..., d] of any float type, `weight` [d]. The mean is taken in fp32, and the row is rounded
    to x's type before the weight is applied: what checkpoints were trained with.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
