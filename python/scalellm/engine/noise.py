"""Counter-based noise: a pure function of (seed, choice, output index) and a counter.

No generator state, so a row's noise depends neither on its neighbours nor on what was drawn before,
and a replay at output index i draws what the first attempt drew. The bits are splitmix64's
(Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): its finaliser over a
Weyl sequence that starts at a hash of the row's key.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def row_keys(
    seeds: Sequence[int], choices: Sequence[int], indices: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Start of each row's sequence, int64 [rows]. Seeds are unsigned 64 bit."""
    weyl = np.uint64(_WEYL)
    key = _finalise_numpy(np.array(seeds, dtype=np.uint64) + weyl)
    key = _finalise_numpy(key ^ (np.array(choices, dtype=np.uint64) * weyl))
    key = _finalise_numpy(key + (np.array(indices, dtype=np.uint64) + np.uint64(1)) * weyl)
    return key.view(np.int64)


def _finalise_numpy(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(_SHIFTS[0]))) * np.uint64(_MULTIPLIERS[0])
    bits = (bits ^ (bits >> np.uint64(_SHIFTS[1]))) * np.uint64(_MULTIPLIERS[1])
    return bits ^ (bits >> np.uint64(_SHIFTS[2]))


def gumbel(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 [rows, n]; `keys` int64 [rows, 1], `counters` int64 [., n]."""
    bits = keys + (counters + 1) * _signed(_WEYL)
    bits = (bits ^ _shift(bits, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    bits = (bits ^ _shift(bits, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    bits = bits ^ _shift(bits, _SHIFTS[2])
    # 52 bits and a half: never 0 or 1, and exact in float64
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
