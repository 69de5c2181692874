"""Compile every kernel as it is started, for a GPU that need not be there; print what it takes.

Each kernel runs through its own starter on tensors that are never read, in the types and widths of
Mixtral-8x7B. Triton carries the assembler, so registers and shared memory are the real ones.
"""

import sys

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


class Absent:
    """A driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only() -> None:
    """Let starting a kernel compile it, and name it with its shared memory and size in bytes."""
    start = JITFunction.run

    def run(kernel, *args, **more):
        compiled = start(kernel, *args, **{**more, "warmup": True})
        size = len(compiled.asm["cubin"])
        sys.stdout.write(f"{kernel.__name__} {compiled.metadata.shared} {size}\n")
        return compiled

    JITFunction.run = run


def main() -> None:
    driver.set_active(Absent())
    compile_only()
    from scalellm.kernels.attention import HeadNorm, Heads, LayerCache, PagedStep
    from scalellm.kernels.attention import triton as attention
    from scalellm.kernels.linear import triton as linear
    from scalellm.kernels.linear.fp8 import Fp8Matrix
    from scalellm.kernels.moe import triton as moe
    from scalellm.kernels.quantise import FP8, Fp8Rows
    from scalellm.kernels.quantise import triton as quantise
    from scalellm.kernels.rms_norm import triton as rms_norm
    from scalellm.kernels.sampling import DRAW
    from scalellm.kernels.sampling import triton as sampling

    def of(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    def whole(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    def fp8(*shape, scales):
        return Fp8Matrix(of(*shape, dtype=FP8), of(*scales, dtype=torch.float32))

    scores = of(2, 32000, dtype=torch.float32)
    sampling.greedy(scores)
    sampling.draw(scores, np.array([(1.0, 0.9, 0.0, 5, 1, 2, 3)] * 2, DRAW))
    hidden, inner, experts = 4096, 14336, 8
    x = of(4, hidden)
    rms_norm.add_rms_norm(x, x, x[0], 1e-5, fp8=True)
    quantise.quantise_rows(x)
    step = PagedStep(whole(4, 3), whole(4, 300), whole(3), whole(2, 2), whole(20))
    heads = Heads(32, 8, 128, 4096, HeadNorm(of(128), of(128), 1e-6))
    for dtype in (torch.bfloat16, FP8):
        cache = LayerCache(of(9, 8, 16, 128, dtype=dtype), of(9, 8, 16, 128, dtype=dtype))
        angles = of(20, 128, dtype=torch.float32)
        attention.attention(of(20, 48 * 128), heads, angles, cache, step)
    for rows in (1, 512):
        x, out = of(rows, hidden), of(rows, 6144)
        x8 = Fp8Rows(of(rows, hidden, dtype=FP8), of(rows, 1, dtype=torch.float32))
        linear.linear(x, of(6144, hidden), out=out)
        linear.linear(x8, fp8(6144, hidden, scales=(6144, 1)), out=out)
        linear.linear(x8, fp8(6144, hidden, scales=(48, 32)), out=out)
        gate_ups = fp8(experts, 2 * inner, hidden, scales=(experts, 2 * inner, 1))
        downs = fp8(experts, hidden, inner, scales=(experts, hidden, 1))
        moe.experts(x8, of(rows, experts), gate_ups, downs, 2, True, torch.bfloat16)
        half = [
            fp8(4, *m.data.shape[1:], scales=(4, m.data.shape[1], 1)) for m in (gate_ups, downs)
        ]
        tally = torch.zeros(3 + experts, dtype=torch.int64)
        moe.experts(x8, of(rows, experts), *half, 2, True, torch.bfloat16, 4, tally=tally, shares=2)


if __name__ == "__main__":
    sys.exit(main())
