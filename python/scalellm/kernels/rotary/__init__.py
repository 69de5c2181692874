"""Rotary position embedding of queries and keys."""

from torch import Tensor

from scalellm.kernels import device
from scalellm.kernels.rotary import cpu, reference
from scalellm.kernels.rotary.reference import apply_rotary

__all__ = ["apply_rotary", "rotary_angles"]


def rotary_angles(positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """`positions` [T] int64, on a GPU int32, `frequencies` [r / 2] fp32, radians per position.

    Returns [T, r] fp32: factor * cos of each angle, then factor * sin.
    """
    if positions.device.type == "cpu" and not device.on_gpu(positions):
        return cpu.rotary_angles(positions, frequencies, factor)
    return reference.rotary_angles(positions, frequencies, factor)
