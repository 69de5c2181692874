"""Rotary frequencies and their stretching for contexts longer than in training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels.rotary import rotary_angles


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions turn queries and keys; `kind` decides which of the later fields count."""

    theta: float
    dim: int  # numbers of a head that are turned
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    original_max_position: int = 0  # positions in training, before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations in training above which a frequency stays
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by factor
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: whole bounds of the blend


ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


class Rotary:
    """Angles of positions."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self.frequencies = rope_frequencies(config).to(device)
        self.attention_factor = config.attention_factor

    def __call__(self, positions: Tensor) -> Tensor:
        """[T] int64 -> [T, dim] fp32: cos of each pair's angle, then sin."""
        return rotary_angles(positions, self.frequencies, self.attention_factor)


def rope_frequencies(config: RopeConfig) -> Tensor:
    """Radians per position of each pair, [dim / 2] fp32.

    `dynamic` equals default here: it only differs beyond max_position_embeddings, where no request
    is admitted.
    """
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    frequencies = 1.0 / config.theta**exponents
    match config.kind:
        case "linear":
            return frequencies / config.factor
        case "llama3":
            return _llama3(frequencies, config)
        case "yarn":
            return _yarn(frequencies, config)
        case _:
            return frequencies


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are divided by factor, short ones stay, the rest is blended."""
    rotations = config.original_max_position * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / config.factor


def _yarn(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """YaRN (Peng et al., 2023): blend by pair index between where beta_fast and beta_slow fall."""

    def pair_of(rotations: float) -> float:
        wavelength = config.original_max_position / (rotations * 2 * math.pi)
        return config.dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    pairs = torch.arange(config.dim // 2, dtype=torch.float32)
    stretch = ((pairs - low) / (max(high - low, 0) or 0.001)).clamp(0.0, 1.0)
    return stretch * frequencies / config.factor + (1 - stretch) * frequencies


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """The temperature that goes with a stretch, as DeepSeek's checkpoints extend it."""

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
