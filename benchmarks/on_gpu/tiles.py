"""Which tiles to try for which matrices, and the file that the best ones are written to."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from typing import Any

from scalellm.kernels.tuning import Tile, default_tile

ROWS = (16, 32, 64, 512)


@dataclass(frozen=True, slots=True)
class Problem:
    """One matrix [n, k] of a model, `gated` if it is gate and up; of `experts` experts, if any."""

    kernel: str
    n: int
    k: int
    gated: bool = False
    experts: int = 0
    top: int = 0


@dataclass(frozen=True, slots=True)
class Best:
    problem: Problem
    rows: int
    tile: Tile
    seconds: float
    default_s: float


def problems(shape: Mapping[str, Any], format: str) -> list[Problem]:
    """The matrices of a model's layers, and in bf16 its output layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = shape.get("head_dim", hidden // shape["num_attention_heads"])
    queries = shape["num_attention_heads"] * width
    both = queries + 2 * shape["num_key_value_heads"] * width
    name = f"linear {format}"
    found = [Problem(name, both, hidden), Problem(name, hidden, queries)]
    experts, top = shape.get("num_local_experts", 0), shape.get("num_experts_per_tok", 0)
    if experts:
        name = f"experts {format}"
    found += [
        Problem(name, 2 * inner, hidden, True, experts, top),
        Problem(name, hidden, inner, False, experts, top),
    ]
    return [*found, Problem("linear bf16", shape["vocab_size"], hidden)]


def candidates(rows: int) -> Iterator[Tile]:
    tile_rows = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    warps = (8,) if tile_rows == 128 else (4,)
    for outputs, k, warp, stages in product((16, 32, 64, 128, 256), (64, 128, 256), warps, (3, 5)):
        yield Tile(tile_rows, outputs, k, warp, stages)


def best_tile(problem: Problem, rows: int, run: Callable[[Tile], float]) -> Best:
    """The fastest tile by `run`, the default one where nothing is faster."""
    copies = min(problem.experts, rows * problem.top) if problem.experts else 1
    usual = default_tile(problem.kernel, rows, problem.n * copies)
    usual_s = run(usual)
    tile, seconds = usual, usual_s
    for candidate in candidates(rows):
        try:
            taken = run(candidate)
        except Exception as error:
            # Triton's own exceptions for too much shared memory have no common base.
            print(f"  {candidate}: {type(error).__name__}", file=sys.stderr)
            continue
        if taken < seconds:
            tile, seconds = candidate, taken
    return Best(problem, rows, tile, seconds, usual_s)


def toml(gpu: str, found: Sequence[Best]) -> str:
    day = datetime.now(UTC).date().isoformat()
    lines = [f"# Tiles for {gpu}, measured {day} by benchmarks/tune_gpu.py.", ""]
    for best in found:
        tile, problem = best.tile, best.problem
        lines += [
            "[[tile]]",
            f'kernel = "{problem.kernel}"',
            f"n = {problem.n}",
            f"k = {problem.k}",
            f"rows = {best.rows}",
            f"tile = [{tile.rows}, {tile.outputs}, {tile.k}]",
            f"warps = {tile.warps}",
            f"stages = {tile.stages}",
            f"# {best.seconds * 1e6:.1f} us; the default tile takes {best.default_s * 1e6:.1f}",
            "",
        ]
    return "\n".join(lines)
