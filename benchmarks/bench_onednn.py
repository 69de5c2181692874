"""Our int8 products beside oneDNN's, which torch, vLLM and OpenVINO call on a CPU.

    python benchmarks/bench_onednn.py [--rows 1,8,64,256] [--rounds N] [--seconds S]

Qwen3-0.6B's matrices. Both in turn, in this process, with as many threads. oneDNN is given
activations that are bytes already and scales of one for all (`onednn::qlinear_pointwise`, weights
prepacked for the number of rows, bf16 out); ours quantise each token's bf16 activations, in groups
where they do, and multiply silu(gate) by up. Weights take turns, so that they come from memory.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from document import write_section

from scalellm import _core
from scalellm.bench.kernels_linear import product_of
from scalellm.bench.machine import describe_machine
from scalellm.bench.model_shape import QWEN3_0_6B, MatrixShape
from scalellm.bench.timing import copies_of, median_s
from scalellm.controller.cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent


def onednn(matrix: MatrixShape, rows: int) -> tuple[Callable[[], None], int]:
    """What multiplies with each of some copies of a matrix, and how many these are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 255, (rows, matrix.k), dtype=torch.uint8, generator=generator)
    scales, zeros = torch.full((matrix.n,), 0.01), torch.zeros(matrix.n, dtype=torch.int32)
    copies = []
    for _ in range(copies_of(matrix.n * matrix.k)):
        weight = torch.randint(-127, 128, (matrix.n, matrix.k), dtype=torch.int8)
        copies.append(torch.ops.onednn.qlinear_prepack(weight, [rows, matrix.k]))

    def all_in_turn() -> None:
        for weight in copies:
            torch.ops.onednn.qlinear_pointwise(
                x, 0.02, 128, weight, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

    return all_in_turn, len(copies)


def compare(rows: Sequence[int], rounds: int, seconds: float) -> list[str]:
    lines = []
    for matrix in QWEN3_0_6B.matrices:
        for count in rows:
            both = (product_of(matrix, "int8", count), onednn(matrix, count))
            found: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for times, (call, copies) in zip(found, both, strict=True):
                    times.append(1e6 * median_s(call, seconds) / copies)
            ratios = [ours / theirs for ours, theirs in zip(*found, strict=True)]
            ours, theirs = (statistics.median(times) for times in found)
            lines.append(
                f"| {matrix.name}, {matrix.n} x {matrix.k} | {count} | {ours:.0f} | {theirs:.0f} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.25, help="each time, at least")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    options = parser.parse_args()
    threads = usable_cores()
    _core.cpu_start(threads, 0)
    torch.set_num_threads(threads)
    rows = [int(count) for count in options.rows.split(",")]
    lines = compare(rows, options.rounds, options.seconds)
    machine = describe_machine()
    text = (
        f"int8 products on {threads} cores of {machine['cpu']}, torch {torch.__version__}, with\n\n"
        "    python benchmarks/bench_onednn.py\n\n"
        "| matrix | rows | ours, us | oneDNN, us | ours by oneDNN's |\n|---|---:|---:|---:|---:|\n"
        + "\n".join(lines)
        + "\n\noneDNN's activations are bytes already; ours are quantised in these times, and gate "
        "and up multiplied.\n"
    )
    if options.docs != "none":
        write_section(Path(options.docs), "onednn", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
