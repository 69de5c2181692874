"""Measure which tiles this GPU's kernels like best, and write them where the kernels look for them.

    python benchmarks/tune_gpu.py --model mixtral-8x7b --model qwen3-0.6b
    python benchmarks/tune_gpu.py --model mixtral-8x7b --out tiles.toml

The file is python/scalellm/kernels/tuned/NAME_OF_THE_GPU.toml: one entry for each kernel, matrix
and number of rows, and, where FlashInfer is installed, whose kernel computes prompts' attention. A
tile that does not fit the GPU is passed over.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from make_shape import SHAPES
from on_gpu import kernels, prefill, timing
from on_gpu.tiles import ROWS, Best, Problem, best_tile, problems, toml

from scalellm.kernels.linear import triton as linear
from scalellm.kernels.linear.fp8 import Fp8Matrix
from scalellm.kernels.moe import triton as moe
from scalellm.kernels.quantise import FP8, GROUP, Fp8Rows, quantise_rows
from scalellm.kernels.tuning import Tile, file_name

TUNED = Path(__file__).parent.parent / "python" / "scalellm" / "kernels" / "tuned"


def runner(problem: Problem, rows: int) -> Callable[[Tile], float]:
    """What times a tile on random numbers, over matrices that exceed the L2 together."""
    device, fp8 = torch.device("cuda"), problem.kernel.endswith("fp8")
    n, k, experts = problem.n, problem.k, problem.experts
    lead = (experts,) if experts else ()

    def matrix() -> torch.Tensor | Fp8Matrix:
        if not fp8:
            return torch.randn(*lead, n, k, device=device, dtype=torch.bfloat16)
        scales = torch.ones(*lead, n, 1, device=device)
        return Fp8Matrix(kernels.random_fp8(*lead, n, k, device=device), scales)

    weights = [matrix() for _ in range(max(1, (256 << 20) // (n * k * max(experts, 1))))]
    tokens = max(1, rows * experts // problem.top) if experts else rows
    routed: moe.Routed | None = None
    if experts:
        logits = torch.randn(tokens, experts, device=device, dtype=torch.bfloat16)
        routed = moe.Routed(logits, problem.top, True)
    given = routed.choices if routed is not None and not problem.gated else tokens
    plain = torch.randn(given, k, device=device, dtype=torch.bfloat16)
    x = quantise_rows(plain) if fp8 else plain
    computed = tokens if routed is None else routed.choices
    outputs = n // 2 if problem.gated else n
    out: torch.Tensor | Fp8Rows = plain.new_empty(computed, outputs)
    if fp8 and problem.gated:
        groups = -(-outputs // GROUP)
        out = Fp8Rows(
            torch.empty(computed, outputs, dtype=FP8, device=device),
            torch.empty(computed, groups, device=device),
        )

    def run(tile: Tile) -> float:
        def call() -> None:
            for weight in weights:
                if routed is not None:
                    moe.product_of_experts(x, weight, routed, out, outputs, problem.gated, tile)
                elif not isinstance(out, Fp8Rows):
                    linear.linear(x, weight, out=out, gated=problem.gated, tile=tile)
                elif isinstance(x, Fp8Rows) and isinstance(weight, Fp8Matrix):
                    linear.linear_silu_and_mul_fp8(x, weight, tile=tile)
                else:
                    raise TypeError(f"{problem.kernel} of {type(x).__name__}")

        return timing.seconds(call, calls=2) / len(weights)

    return run


def prefills(models: list[str]) -> str:
    """Who computes prompts' attention, for the models' heads; nothing without FlashInfer."""
    version = prefill.installed()
    if version is None:
        print("flashinfer is not installed: prompts' attention stays Triton's", flush=True)
        return ""
    sections = {}
    for model in models:
        heads, layers = prefill.heads_of(SHAPES[model]), SHAPES[model]["num_hidden_layers"]
        for kv_dtype in (torch.bfloat16, FP8):
            found = prefill.timed(heads, kv_dtype, layers)
            sections[heads, kv_dtype] = prefill.toml(heads, kv_dtype, found, version)
            print(sections[heads, kv_dtype], flush=True)
    return "\n".join(sections.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Tune this GPU's tiles.")
    parser.add_argument("--model", action="append", choices=SHAPES, required=True)
    parser.add_argument("--format", action="append", choices=("fp8", "bf16"))
    parser.add_argument("--out", type=Path, help="default: where the kernels look")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    out = options.out or TUNED / f"{file_name(gpu)}.toml"
    wanted = {
        problem: None
        for model in options.model
        for format in options.format or ("fp8", "bf16")
        for problem in problems(SHAPES[model], format)
    }
    attention = prefills(options.model)
    found: list[Best] = []
    for problem in wanted:
        for rows in ROWS:
            found.append(best := best_tile(problem, rows, runner(problem, rows)))
            print(f"{problem} {rows} rows: {best.tile}, {best.seconds * 1e6:.1f} us", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(toml(gpu, found) + attention, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
