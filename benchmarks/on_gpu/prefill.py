"""Prompts' attention by Triton's kernel, and by FlashInfer's where that is installed."""

import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from on_gpu.timing import seconds
from scalellm.kernels.attention import (
    Heads,
    KVCache,
    KVGeometry,
    plan_pages,
)
from scalellm.kernels.attention.flashinfer import FlashInferPrefill, obstacle
from scalellm.kernels.quantise import FP8
from scalellm.kernels.tuning import PREFILLS, type_name

BLOCK = 16
# Prompts of a step, tokens of each, tokens before them.
CASES = ((1, 512, 0), (4, 512, 0), (1, 2048, 0), (1, 2048, 14336))
_LEAST_GAIN = 0.03  # for which a package that may be missing tomorrow is worth it
_PLANS = 20


@dataclass(frozen=True, slots=True)
class Timed:
    """One case. A plan is a step's; what it takes is divided among the step's layers."""

    case: tuple[int, int, int]
    triton_s: float
    flashinfer_s: float | None  # None: it is not there

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        prompts, tokens, before = self.case
        return prompts * (tokens * before + tokens * (tokens + 1) // 2)


def installed() -> str | None:
    """FlashInfer's version; None where it is not there."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    return importlib.metadata.version("flashinfer-python")


def heads_of(shape: Mapping[str, Any]) -> Heads:
    heads = shape["num_attention_heads"]
    width = shape.get("head_dim", shape["hidden_size"] // heads)
    return Heads(heads, shape["num_key_value_heads"], width, shape.get("sliding_window"), None)


def timed(heads: Heads, kv_dtype: torch.dtype, layers: int) -> list[Timed]:
    return [_timed(heads, kv_dtype, layers, case) for case in CASES]


def _timed(heads: Heads, kv_dtype: torch.dtype, layers: int, case: tuple[int, int, int]) -> Timed:
    from scalellm.kernels.attention import triton

    device, dtype = torch.device("cuda"), torch.bfloat16
    prompts, tokens, before = case
    each = -(-(before + tokens) // BLOCK)
    blocks = np.random.default_rng(0).permutation(prompts * each).astype(np.int32)
    dim = heads.head_dim
    geometry = KVGeometry(1, heads.num_kv_heads, dim, dim, (heads.window,))
    cache = KVCache.allocate(geometry, len(blocks), BLOCK, kv_dtype, device).layers[0]
    index = np.arange(prompts)
    spans = np.stack((index * tokens, index * 0 + before, index * 0 + tokens, index * each), axis=1)
    step = plan_pages(spans, blocks, BLOCK).to(device)
    query = torch.randn(prompts * tokens, heads.num_heads, dim, device=device, dtype=dtype)
    out = torch.empty_like(query)
    triton_s = seconds(lambda: triton.prefill(query, heads, cache, step, out))
    if installed() is None or obstacle(heads, dim, dtype, kv_dtype) is not None:
        return Timed(case, triton_s, None)
    package = importlib.import_module("flashinfer")
    made = FlashInferPrefill(package, heads, (heads.window,), dtype, kv_dtype, device)
    took = []
    for _ in range(_PLANS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        planned = made.plan(spans, blocks, BLOCK)
        took.append(time.perf_counter() - began)
    if planned is None:
        raise ValueError(f"{case} cannot be planned")
    ran_s = seconds(lambda: planned.run(query, heads, cache, out))
    return Timed(case, triton_s, ran_s + statistics.median(took) / layers)


def winner(found: Sequence[Timed]) -> str:
    """Of PREFILLS, by the mean of the cases' ratios."""
    ratios = [one.flashinfer_s / one.triton_s for one in found if one.flashinfer_s is not None]
    is_faster = len(ratios) == len(found) and statistics.fmean(ratios) < 1 - _LEAST_GAIN
    return PREFILLS[is_faster]


def toml(heads: Heads, kv_dtype: torch.dtype, found: Sequence[Timed], version: str) -> str:
    """The section that kernels/tuning.py reads."""
    lines = [
        "[[prefill]]",
        f"heads = {heads.num_heads}",
        f"kv_heads = {heads.num_kv_heads}",
        f"head_dim = {heads.head_dim}",
        f'kv = "{type_name(kv_dtype)}"',
        f"windowed = {'false' if heads.window is None else 'true'}",
        f'by = "{winner(found)}"',
    ]
    for one in found:
        other = "-" if one.flashinfer_s is None else f"{one.flashinfer_s * 1e6:.1f}"
        prompts, tokens, before = one.case
        lines.append(
            f"# {prompts} x {tokens} after {before}: Triton {one.triton_s * 1e6:.1f} us, "
            f"FlashInfer {version} {other}"
        )
    return "\n".join([*lines, ""])


def measure(shapes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model, type of keys and values, and case."""
    rows = []
    for model, shape in shapes.items():
        heads, layers = heads_of(shape), shape["num_hidden_layers"]
        for kv_dtype in (torch.bfloat16, FP8):
            for one in timed(heads, kv_dtype, layers):
                flop = 4 * one.pairs * heads.num_heads * heads.head_dim
                times = {"triton": one.triton_s, "flashinfer": one.flashinfer_s}
                prompts, tokens, before = one.case
                rows.append(
                    {
                        "heads": f"{model}, {type_name(kv_dtype)}",
                        "shape": f"{prompts} x {tokens} after {before}",
                        "seconds": times,
                        "tflop_s": {
                            name: None if taken is None else flop / taken / 1e12
                            for name, taken in times.items()
                        },
                    }
                )
    return rows
