"""The next token of every row, in Triton: the ids that crates/cpu-kernels/src/sampling draws.

    peaks      the largest of each 512 scores              a program per row and group
    masses     each group's sum of e^scaled                a program per row and group
    draw       the largest score, or noise by group        a program per row
    truncated  where top_k and top_p end, then noise       a program per row that has them

Scaled scores, (score - largest) / temperature, are at most 0, so the bits of their absolute value
order them: `rank`, 0 for the best. Where top_k and top_p end is found by halving ranks, a pass over
the row each: nothing is sorted.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 512
_CHUNK = 4096
_WEYL = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_TOKEN_STREAM = tl.constexpr(1 << 40)
_WORST = tl.constexpr(0x7F800000)  # rank of minus infinity
_GREEDY_BELOW = tl.constexpr(1e-5)
_FIELDS = tl.constexpr(7)  # of DRAW, 8 bytes each


@triton.jit
def _finalise(bits):
    bits = (bits ^ (bits >> 30)) * _FIRST
    bits = (bits ^ (bits >> 27)) * _SECOND
    return bits ^ (bits >> 31)


@triton.jit
def _row_key(seed, choice, index):
    key = _finalise(seed + _WEYL)
    key = _finalise(key ^ (choice * _WEYL))
    return _finalise(key + (index + 1) * _WEYL)


@triton.jit
def _gumbel(key, counter):
    """Standard Gumbel noise, float64; `counter` uint64."""
    bits = _finalise(key + (counter + 1) * _WEYL) >> 12
    uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _peaks(scores, peaks, vocab, stride, groups, GROUP: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = group * GROUP + tl.arange(0, GROUP)
    found = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    # Largest numbers skip NaN, sums do not.
    broken = tl.sum((found != found).to(tl.int32)) > 0
    tl.store(peaks + row * groups + group, tl.where(broken, float("nan"), tl.max(found)))


@triton.jit
def _row_peak(peaks, row, groups, GROUPS: tl.constexpr):
    """The row's largest score, and the first group that has it; NaN where there is one."""
    group = tl.arange(0, GROUPS)
    found = tl.load(peaks + row * groups + group, mask=group < groups, other=float("-inf"))
    best = tl.max(found)
    broken = tl.sum((found != found).to(tl.int32)) > 0
    return tl.where(broken, float("nan"), best), tl.min(tl.where(found == best, group, GROUPS))


@triton.jit
def _masses(
    scores, peaks, draws, masses, vocab, stride, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(draws + row * _FIELDS).to(tl.float64, bitcast=True)
    if temperature >= _GREEDY_BELOW:
        best, _ = _row_peak(peaks, row, groups, GROUPS)
        ids = group * GROUP + tl.arange(0, GROUP)
        found = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
        mass = tl.sum(tl.exp((found - best) / temperature.to(tl.float32)))
        tl.store(masses + row * groups + group, mass)


@triton.jit
def _first_of(value, ids):
    """The lowest of `ids` that has the largest `value`."""
    return tl.min(tl.where(value == tl.max(value), ids, 0x7FFFFFFF))


@triton.jit
def _draw(
    scores, peaks, draws, masses, out, vocab, stride, groups, NOISE: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best, group = _row_peak(peaks, row, groups, GROUPS)
    member = tl.arange(0, GROUP)
    noisy = False
    if NOISE:
        own = draws + row * _FIELDS
        temperature = tl.load(own).to(tl.float64, bitcast=True)
        noisy = temperature >= _GREEDY_BELOW
        key = _row_key(
            tl.load(own + 4).to(tl.uint64),
            tl.load(own + 5).to(tl.uint64),
            tl.load(own + 6).to(tl.uint64),
        )
        if noisy:
            each = tl.arange(0, GROUPS)
            mass = tl.load(masses + row * groups + each, mask=each < groups, other=0.0)
            chances = tl.log(mass.to(tl.float64)) + _gumbel(key, each.to(tl.uint64))
            group = _first_of(tl.where(each < groups, chances, float("-inf")), each)
    ids = group * GROUP + member
    found = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    value = found.to(tl.float64)
    if NOISE:
        if noisy:
            weight = tl.exp((found - best) / temperature.to(tl.float32))
            noise = _gumbel(key, ids.to(tl.uint64) + _TOKEN_STREAM)
            value = tl.log(weight.to(tl.float64)) + noise
    drawn = tl.minimum(_first_of(value, ids), vocab - 1)
    finite = (best == best) & (tl.abs(best) != float("inf"))
    tl.store(out + row, tl.where(finite, drawn, -1))


@triton.jit
def _rank(scores, row, first, best, temperature, vocab, stride, CHUNK: tl.constexpr):
    """Ranks and scaled scores of a chunk of ids; beyond the vocabulary the rank is past all."""
    ids = first + tl.arange(0, CHUNK)
    found = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    scaled = (found - best) / temperature
    rank = tl.abs(scaled).to(tl.int32, bitcast=True)
    return tl.where(ids < vocab, rank, _WORST + 1), scaled, ids


@triton.jit
def _mass_before(scores, row, limit, kept, best, temperature, vocab, stride, CHUNK: tl.constexpr):
    """Sum of e^scaled, float64, of ranks below `limit` and at most `kept`; and their number."""
    mass = tl.zeros([CHUNK], tl.float64)
    count = tl.zeros([CHUNK], tl.int32)
    for first in range(0, vocab, CHUNK):
        rank, scaled, _ = _rank(scores, row, first, best, temperature, vocab, stride, CHUNK)
        there = (rank < limit) & (rank <= kept)
        mass += tl.where(there, tl.exp(scaled.to(tl.float64)), 0.0)
        count += there.to(tl.int32)
    return tl.sum(mass), tl.sum(count)


@triton.jit
def _truncated(
    scores, peaks, draws, masses, out, vocab, stride, groups, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = draws + row * _FIELDS
    wide = tl.load(own).to(tl.float64, bitcast=True)
    top_p = tl.load(own + 1).to(tl.float64, bitcast=True)
    min_p = tl.load(own + 2).to(tl.float64, bitcast=True)
    top_k = tl.load(own + 3)
    best, _group = _row_peak(peaks, row, groups, GROUPS)
    truncated = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if (wide >= _GREEDY_BELOW) & truncated & (tl.abs(best) < float("inf")):
        temperature = wide.to(tl.float32)
        each = tl.arange(0, GROUPS)
        mass = tl.load(masses + row * groups + each, mask=each < groups, other=0.0)
        total = tl.sum(mass.to(tl.float64))
        kept = tl.full((), _WORST, tl.int32)
        if top_k > 0:
            low = kept * 0
            while low < kept:  # the least rank that at least top_k reach
                middle = low + (kept - low) // 2
                _mass, count = _mass_before(
                    scores, row, middle + 1, _WORST, best, temperature, vocab, stride, CHUNK
                )
                enough = count >= tl.minimum(top_k, vocab)
                kept = tl.where(enough, middle, kept)
                low = tl.where(enough, low, middle + 1)
            total, _count = _mass_before(
                scores, row, kept + 1, kept, best, temperature, vocab, stride, CHUNK
            )
        last = kept
        ties = kept * 0 + 0x7FFFFFFF  # of rank `last`, how many ids are kept
        if top_p < 1.0:
            low = kept * 0
            while low < last:  # the largest rank before which there is less than top_p
                middle = last - (last - low) // 2
                before, _below = _mass_before(
                    scores, row, middle, kept, best, temperature, vocab, stride, CHUNK
                )
                less = before < top_p * total
                low = tl.where(less, middle, low)
                last = tl.where(less, last, middle - 1)
            before, _below = _mass_before(
                scores, row, last, kept, best, temperature, vocab, stride, CHUNK
            )
            each_mass = tl.exp(-last.to(tl.float32, bitcast=True).to(tl.float64))
            wanted = (top_p * total - before) / tl.maximum(each_mass, 1e-300)
            ties = tl.maximum(tl.ceil(tl.minimum(wanted, 1e9)).to(tl.int32), 1)
        key = _row_key(
            tl.load(own + 4).to(tl.uint64),
            tl.load(own + 5).to(tl.uint64),
            tl.load(own + 6).to(tl.uint64),
        )
        least = tl.log(min_p)
        most = tl.full((), float("-inf"), tl.float64)
        drawn = tl.load(out + row)
        tied = ties * 0
        for first in range(0, vocab, CHUNK):
            rank, scaled, ids = _rank(scores, row, first, best, temperature, vocab, stride, CHUNK)
            at_last = (rank == last).to(tl.int32)
            place = tied + tl.cumsum(at_last, 0) - at_last
            tied += tl.sum(at_last)
            keep = (rank < last) | ((rank == last) & (place < ties))
            keep = keep & ((scaled.to(tl.float64) >= least) | (rank == 0))
            noise = _gumbel(key, ids.to(tl.uint64) + _TOKEN_STREAM)
            value = tl.where(keep, scaled.to(tl.float64) + noise, float("-inf"))
            peak = tl.max(value)
            better = peak > most
            drawn = tl.where(better, _first_of(value, ids), drawn)
            most = tl.where(better, peak, most)
        tl.store(out + row, drawn)


def greedy(scores: Tensor) -> Tensor:
    """The lowest id of each row's largest score, int32 [rows]; -1 where that is not finite.

    `scores` [rows, vocab] float32."""
    peaks, out = _room(scores)
    rows, vocab = scores.shape
    groups = peaks.shape[1]
    if rows:
        _peaks[(rows, groups)](scores, peaks, vocab, scores.stride(0), groups, GROUP=GROUP)
        _draw[(rows,)](
            scores, peaks, peaks, peaks, out, vocab, scores.stride(0), groups,
            NOISE=False, GROUP=GROUP, GROUPS=triton.next_power_of_2(groups),
        )  # fmt: skip
    return out


def draw(scores: Tensor, draws: npt.NDArray[np.void]) -> Tensor:
    """An id for each row of `scores` [rows, vocab] float32, as `draws` [rows] of DRAW say; -1 for
    rows whose scores hold NaN or infinity, or nothing but minus infinity."""
    peaks, out = _room(scores)
    rows, vocab = scores.shape
    if not rows:
        return out
    groups = peaks.shape[1]
    padded = triton.next_power_of_2(groups)
    stride = scores.stride(0)
    wanted = torch.from_numpy(draws.view(np.int64)).to(scores.device, non_blocking=True)
    masses = torch.empty_like(peaks)
    _peaks[(rows, groups)](scores, peaks, vocab, stride, groups, GROUP=GROUP)
    _masses[(rows, groups)](
        scores, peaks, wanted, masses, vocab, stride, groups, GROUP=GROUP, GROUPS=padded
    )
    arguments = (scores, peaks, wanted, masses, out, vocab, stride, groups)
    _draw[(rows,)](*arguments, NOISE=True, GROUP=GROUP, GROUPS=padded)
    if ((draws["top_k"] > 0) | (draws["top_p"] < 1.0) | (draws["min_p"] > 0.0)).any():
        _truncated[(rows,)](*arguments, CHUNK=_CHUNK, GROUPS=padded, num_warps=8)
    return out


def _room(scores: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocab = scores.shape
    peaks = torch.empty(rows, triton.cdiv(vocab, GROUP), dtype=torch.float32, device=scores.device)
    return peaks, torch.empty(rows, dtype=torch.int32, device=scores.device)
