"""Rotary angles by the kernels of crates/cpu-kernels, as a torch operator."""

import torch
from torch import Tensor

from scalellm import _core
from scalellm.kernels.operator import define


def _rotary_angles(positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    out = torch.empty(len(positions), 2 * len(frequencies))
    held = (positions.data_ptr(), len(positions))
    _core.cpu_rotary_angles(held, frequencies.tolist(), factor, out.data_ptr())
    return out


_OPERATOR = define(
    "rotary_angles(Tensor positions, Tensor frequencies, float factor) -> Tensor", _rotary_angles
)


def rotary_angles(positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """As in reference.py."""
    out: Tensor = _OPERATOR(positions, frequencies, factor)
    return out
