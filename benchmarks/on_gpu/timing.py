"""How long work on a GPU takes, without what starting it takes."""

import statistics
from collections.abc import Callable

import torch

_CALLS = 10  # of one graph, so that starting it counts for little
_GRAPHS = 7


def seconds(call: Callable[[], object], calls: int = _CALLS) -> float:
    """Median time of `call`, recorded as a graph of several; what it reads should exceed the L2."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    found = [_timed(graph.replay) / calls for _ in range(1 + _GRAPHS)]
    return statistics.median(found[1:])


def _timed(call: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def ceilings() -> dict[str, float]:
    """GB/s of reading and of copying (bytes read and written), TFLOP/s of bf16 and fp8 products."""
    held = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    numbers, half = held.view(torch.float32), len(held) // 2
    read_s = seconds(lambda: numbers.sum(), 2)
    copy_s = seconds(lambda: held[:half].copy_(held[half:]), 2)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16_s = seconds(lambda: a @ b)
    a8, b8 = (x.clamp(-4, 4).to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device="cuda")
    fp8_s = seconds(
        lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    )
    return {
        "read_gb_s": len(held) / read_s / 1e9,
        "copy_gb_s": len(held) / copy_s / 1e9,
        "bf16_tflop_s": 2 * size**3 / bf16_s / 1e12,
        "fp8_tflop_s": 2 * size**3 / fp8_s / 1e12,
    }
