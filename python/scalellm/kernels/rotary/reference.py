"""Rotary position embedding in torch (Su et al., 2021), in the half-split form of checkpoints.

head   [ x_0 ... x_{r/2-1} | x_{r/2} ... x_{r-1} | rest ]
pair      (x_i, x_{i+r/2}) is turned by the angle position * frequency_i; rest is left alone
"""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """`positions` [T] int64, `frequencies` [r / 2] fp32, radians per position.

    Returns [T, r] fp32: factor * cos of each angle, then factor * sin.
    """
    angles = positions[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).mul_(factor)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of `x` [T, heads, d] by its position's angles.

    `cos` and `sin` [T, r/2] with r <= d, of x's type. Returns a new tensor of x's shape.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        turned.append(x[..., 2 * half :])
    return torch.cat(turned, dim=-1)
