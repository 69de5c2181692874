"""The experts of a sparse layer in Triton, every one of them in the same launch.

    route     softmax, the best few experts of a token, its place among their tokens
    sort      choices by expert                 e0: 3 7 | e1: 0 2 6 | e2: | e3: 1 4 5
    gate_up   silu(gate x) * (up x)             one tile of rows is of one expert
    down      weight * down(...)                a row for each choice
    combine   the sum of a token's rows         [T, hidden]

Tiles begin with each expert: those that the counts do not fill end at once, so a launch's size
depends on nothing but the number of tokens, and a step can be recorded. A token's place among its
expert's differs from run to run and changes nothing: each row is computed for itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.linear.fp8 import Fp8Matrix
from scalellm.kernels.linear.triton import product, silu_and_mul
from scalellm.kernels.quantise.rows import FP8, GROUP, Fp8Rows
from scalellm.kernels.quantise.triton import fp8_scale, warps_of_row
from scalellm.kernels.tuning import Tile, tile_for

_SORTED_AT_ONCE = 64  # choices


@triton.jit
def _route(
    logits,
    weights,
    chosen,
    places,
    counts,
    experts,
    first,
    held,
    TOP: tl.constexpr,
    NORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    scores = tl.load(logits + token * experts + expert, mask=inside, other=float("-inf"))
    scores = scores.to(tl.float32)
    left = tl.exp(scores - tl.max(scores))
    left = left / tl.sum(left)
    slot = tl.arange(0, SLOTS)
    kept = tl.zeros([SLOTS], tl.float32)
    best = tl.zeros([SLOTS], tl.int32)
    for index in tl.static_range(TOP):
        one = tl.argmax(tl.where(inside, left, -1.0), 0)
        weight = tl.sum(tl.where(expert == one, left, 0.0))
        left = tl.where(expert == one, -1.0, left)
        kept = tl.where(slot == index, weight, kept)
        best = tl.where(slot == index, one, best)
    if NORMALISE:
        kept = kept / tl.sum(kept)
    at = token * TOP + slot
    there = slot < TOP
    tl.store(weights + at, kept, mask=there)
    # Scores that are not numbers have chosen something; it has to be an expert that exists.
    best = tl.minimum(best, experts - 1)
    tl.store(places + at, tl.atomic_add(counts + best, 1, mask=there), mask=there)
    mine = (best >= first) & (best < first + held)
    tl.store(chosen + at, tl.where(mine, best - first, -1), mask=there)


@triton.jit
def _count(counts, tally, experts, shares, EXPERTS: tl.constexpr, SHARES: tl.constexpr):
    """Add a layer to `tally`: layers, experts that were chosen, the choices of the busiest of
    `shares` ranks that divide the experts, or expert if SHARES is 0, and those of each expert."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    busiest = tl.max(count)
    if SHARES > 0:
        mine = (expert * shares // experts)[None, :] == tl.arange(0, SHARES)[:, None]
        busiest = tl.max(tl.sum(tl.where(mine, count[None, :], 0), 1))
    one = tl.full((), 1, tl.int64)
    tl.atomic_add(tally, one)
    tl.atomic_add(tally + 1, tl.sum((count > 0).to(tl.int64)))
    tl.atomic_add(tally + 2, busiest.to(tl.int64))
    tl.atomic_add(tally + 3 + expert, count.to(tl.int64), mask=expert < experts)


@triton.jit(do_not_specialize=["choices"])
def _sort(
    chosen,
    places,
    counts,
    order,
    tally,
    choices,
    experts,
    every,
    first_expert,
    shares,
    TALLY: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVERY: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if TALLY:
        if tl.program_id(0) == 0:
            _count(counts, tally, every, shares, EVERY, SHARES)
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choice < choices
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + first_expert + expert, mask=expert < experts, other=0)
    first = tl.cumsum(count, 0) - count
    mine = tl.load(chosen + choice, mask=inside, other=-1)
    before = tl.sum(tl.where(mine[:, None] == expert[None, :], first[None, :], 0), 1)
    place = before + tl.load(places + choice, mask=mine >= 0, other=0)
    tl.store(order + place, choice, mask=mine >= 0)


@triton.jit
def _rows_of_tile(counts, experts, tile, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a tile of ROWS rows, its first row in the order, and how many are there; none
    for a tile beyond the last."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    tiles = (count + ROWS - 1) // ROWS
    end = tl.cumsum(tiles, 0)
    mine = tl.sum((end <= tile).to(tl.int32))
    is_mine = expert == mine
    in_expert = (tile - tl.sum(tl.where(is_mine, end - tiles, 0))) * ROWS
    first = tl.sum(tl.where(is_mine, tl.cumsum(count, 0) - count, 0)) + in_expert
    return mine, first, tl.minimum(tl.sum(tl.where(is_mine, count, 0)) - in_expert, ROWS)


@triton.jit(do_not_specialize=["row_tiles"])
def _experts(
    x,
    x_scales,
    weight,
    weight_scales,
    chosen_weights,
    counts,
    order,
    out,
    out_scales,
    experts,
    n,
    k,
    x_stride,
    scales_of_expert,
    row_tiles,
    TOP: tl.constexpr,
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    X_GROUPED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    TO_FP8: tl.constexpr,
    WHOLE_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program // row_tiles
    expert, first, rows = _rows_of_tile(counts, experts, program % row_tiles, EXPERTS, ROWS)
    if rows > 0:
        member = tl.arange(0, ROWS)
        row_there = member < rows
        choice = tl.load(order + first + member, mask=row_there, other=0).to(tl.int64)
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        output_there = output < n
        row = choice
        outputs_of_expert = n
        if GATED:
            row = choice // TOP
            outputs_of_expert = 2 * n
        sums, more = product(
            x, x_scales, row, row_there,
            weight + expert.to(tl.int64) * outputs_of_expert * k,
            weight_scales + expert.to(tl.int64) * scales_of_expert,
            output, output_there, n, k, x_stride,
            FP8, X_GROUPED, W_BLOCKED, GATED, WHOLE_K, ROWS, OUTPUTS, K,
        )  # fmt: skip
        if GATED:
            sums = silu_and_mul(sums, more)
        else:
            share = tl.load(chosen_weights + choice, mask=row_there, other=0.0)
            sums *= share[:, None]
        if TO_FP8:
            scale = fp8_scale(tl.where(output_there[None, :], sums, 0.0))
            tl.store(out_scales + choice * tl.cdiv(n, OUTPUTS) + tile, scale, mask=row_there)
            sums /= scale[:, None]
        place = choice[:, None] * n + output[None, :]
        there = row_there[:, None] & output_there[None, :]
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=there)


@triton.jit
def _combine(parts, chosen, out, hidden, TOP: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(TOP):
        choice = token * TOP + index
        computed = inside & (tl.zeros([BLOCK], tl.int32) + tl.load(chosen + choice) >= 0)
        part = parts + choice * hidden + columns
        total += tl.load(part, mask=computed, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + columns, total.to(out.dtype.element_ty), mask=inside)


class Routed:
    """The choices of T tokens, sorted by expert; of those experts that a rank holds."""

    def __init__(
        self,
        logits: Tensor,
        top: int,
        normalise: bool,
        first: int = 0,
        held: int | None = None,
        tally: Tensor | None = None,
        shares: int = 0,
    ) -> None:
        """`logits` [T, all experts] of any float type; `held` experts from `first` on, all if None.

        `chosen` counts from `first`, and is -1 where another rank has the expert. `tally` int64
        [4]: what `_count` adds to, the experts divided into `shares`, or each for itself if 0."""
        tokens, every = logits.shape
        self.every, self.experts = every, every if held is None else held
        self.top, self.choices = top, tokens * top
        self.block = max(2, triton.next_power_of_2(self.experts))
        here = logits.device
        self.weights = torch.empty(tokens, top, dtype=torch.float32, device=here)
        self.chosen = torch.empty(tokens, top, dtype=torch.int32, device=here)
        # tokens of each expert
        counts = torch.zeros(every, dtype=torch.int32, device=here)
        self.counts = counts[first : first + self.experts]
        self.order = torch.empty(self.choices, dtype=torch.int32, device=here)
        places = torch.empty_like(self.chosen)
        _route[(tokens,)](
            logits.contiguous(), self.weights, self.chosen, places, counts, every, first,
            self.experts, TOP=top, NORMALISE=normalise, EXPERTS=triton.next_power_of_2(every),
            SLOTS=triton.next_power_of_2(top), num_warps=1,
        )  # fmt: skip
        _sort[(triton.cdiv(self.choices, _SORTED_AT_ONCE),)](
            self.chosen, places, counts, self.order, counts if tally is None else tally,
            self.choices, self.experts, every, first, shares,
            TALLY=tally is not None, EXPERTS=self.block, EVERY=triton.next_power_of_2(every),
            SHARES=triton.next_power_of_2(shares) if shares else 0, BLOCK=_SORTED_AT_ONCE,
            num_warps=4,
        )  # fmt: skip

    def row_tiles(self, rows: int) -> int:
        """Tiles of `rows` rows that suffice, however the tokens are divided."""
        return min(self.choices, self.choices // rows + self.experts)


def experts(
    x: Tensor | Fp8Rows,
    logits: Tensor,
    gate_ups: Tensor | Fp8Matrix,
    downs: Tensor | Fp8Matrix,
    top: int,
    normalise: bool,
    dtype: torch.dtype,
    first: int = 0,
    *,
    tally: Tensor | None = None,
    shares: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """`x` [T, hidden], fp8 where the weights are, through its `top` best experts.

    `logits` [T, all experts]; of E experts from `first` on `gate_ups` [E, 2 * inner, hidden] and
    `downs` [E, hidden, inner]. Returns [T, hidden] of `dtype`. `tally`, `shares`: as of Routed;
    `tile`: for both products.
    """
    held = len(downs.data if isinstance(downs, Fp8Matrix) else downs)
    data = x.data if isinstance(x, Fp8Rows) else x
    hidden = data.shape[1]
    if not len(data):
        return data.new_empty(0, hidden, dtype=dtype)
    routed = Routed(logits, top, normalise, first, held, tally, shares)
    inner_data = downs.data if isinstance(downs, Fp8Matrix) else downs
    inner = inner_data.shape[2]
    computed: Tensor | Fp8Rows
    if isinstance(downs, Fp8Matrix):
        groups = triton.cdiv(inner, GROUP)
        computed = Fp8Rows(
            torch.empty(routed.choices, inner, dtype=FP8, device=data.device),
            torch.empty(routed.choices, groups, dtype=torch.float32, device=data.device),
        )
    else:
        computed = data.new_empty(routed.choices, inner)
    product_of_experts(x, gate_ups, routed, computed, inner, True, tile)
    parts = torch.empty(routed.choices, hidden, dtype=dtype, device=data.device)
    product_of_experts(computed, downs, routed, parts, hidden, False, tile)
    out = parts.new_empty(len(data), hidden)
    block = triton.next_power_of_2(hidden)
    _combine[(len(data),)](
        parts, routed.chosen, out, hidden, TOP=top, BLOCK=block, num_warps=warps_of_row(block),
    )  # fmt: skip
    return out


def product_of_experts(
    x: Tensor | Fp8Rows,
    weight: Tensor | Fp8Matrix,
    routed: Routed,
    out: Tensor | Fp8Rows,
    n: int,
    gated: bool,
    tile: Tile | None,
) -> None:
    """Each choice's row of `out` [choices, n]: silu(gate) * up of its token's row of x if `gated`,
    else its own row of x times its expert's matrix, times the choice's weight."""
    a, x_scales = (x.data, x.scales) if isinstance(x, Fp8Rows) else (x, x)
    w, w_scales = (
        (weight.data, weight.scales) if isinstance(weight, Fp8Matrix) else (weight, weight)
    )
    fp8, k = isinstance(weight, Fp8Matrix), a.shape[1]
    if tile is None:
        expected = -(-routed.choices // routed.every)
        name = "experts fp8" if fp8 else "experts bf16"
        busy = min(routed.choices, routed.experts)
        tile = tile_for(name, expected, w.shape[1], k, a.device, busy)
    grouped = isinstance(x, Fp8Rows) and x.grouped
    blocked = isinstance(weight, Fp8Matrix) and weight.blocked
    step = min(tile.k, GROUP) if grouped or blocked else tile.k
    to_fp8 = isinstance(out, Fp8Rows)
    outputs = GROUP if to_fp8 else tile.outputs
    row_tiles = routed.row_tiles(tile.rows)
    _experts[(row_tiles * triton.cdiv(n, outputs),)](
        a,
        x_scales,
        w,
        w_scales,
        routed.weights,
        routed.counts,
        routed.order,
        out.data if isinstance(out, Fp8Rows) else out,
        out.scales if isinstance(out, Fp8Rows) else out,
        routed.experts,
        n,
        k,
        a.stride(0),
        w_scales.stride(0) if fp8 else 0,
        row_tiles,
        TOP=routed.top,
        GATED=gated,
        FP8=fp8,
        X_GROUPED=grouped,
        W_BLOCKED=blocked,
        TO_FP8=to_fp8,
        WHOLE_K=k % step == 0,
        EXPERTS=routed.block,
        ROWS=tile.rows,
        OUTPUTS=outputs,
        K=step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
