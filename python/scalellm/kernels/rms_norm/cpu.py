"""RMSNorm by the kernels of crates/cpu-kernels, as a torch operator."""

import torch
from torch import Tensor

from scalellm import _core
from scalellm.kernels.operator import define


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = (x.data_ptr(), x.shape[0], x.stride(0))
    _core.cpu_rms_norm(rows, (weight.data_ptr(), weight.shape[0]), eps, out.data_ptr())
    return out


_OPERATOR = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [T, d] bf16, `weight` [d] bf16; returns a new [T, d]."""
    out: Tensor = _OPERATOR(x, weight, eps)
    return out
