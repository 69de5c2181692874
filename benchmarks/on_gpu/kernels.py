"""Kernels in Mixtral-8x7B's and Qwen3-0.6B's shapes: time, bytes they have to read, share of the
bandwidth measured in the same run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from on_gpu.timing import seconds
from scalellm.kernels.attention import Heads, KVCache, KVGeometry, plan_pages
from scalellm.kernels.attention import triton as attention
from scalellm.kernels.linear import triton as linear
from scalellm.kernels.linear.fp8 import Fp8Matrix
from scalellm.kernels.moe import triton as moe
from scalellm.kernels.quantise import FP8, quantise_rows

HIDDEN, INNER, EXPERTS, TOP = 4096, 14336, 8, 2  # Mixtral-8x7B
BLOCK = 16
Row = dict[str, Any]


def measure(ceilings: Mapping[str, float]) -> list[Row]:
    device = torch.device("cuda")
    rows = [experts(tokens, device) for tokens in (1, 8, 32, 64, 512)]
    rows += [
        decode(sequences, context, dtype, device)
        for sequences, context in ((1, 640), (64, 640), (8, 4096), (1, 32768))
        for dtype in (torch.bfloat16, FP8)
    ]
    for n, k in ((6144, 4096), (4096, 4096)):
        rows += [product(tokens, n, k, True, device) for tokens in (1, 64)]
    for n, k in ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)):
        rows.append(product(1, n, k, False, device))
    bandwidth = max(ceilings["read_gb_s"], ceilings["copy_gb_s"])
    for row in rows:
        row["gb_s"] = row["bytes"] / row["seconds"] / 1e9
        row["of_bandwidth"] = row["gb_s"] / bandwidth
    return rows


def random_fp8(*shape: int, device: torch.device) -> Tensor:
    """Small fp8 numbers, made of bytes: a float tensor of the size would be four times as large."""
    made = torch.randint(0, 96, shape, dtype=torch.uint8, device=device)
    return made.view(FP8)


def experts(tokens: int, device: torch.device) -> Row:
    gate_ups, downs = (
        Fp8Matrix(
            random_fp8(EXPERTS, n, k, device=device),
            torch.full((EXPERTS, n, 1), 0.01, device=device),
        )
        for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    x = quantise_rows(torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16))
    logits = torch.randn(tokens, EXPERTS, device=device, dtype=torch.bfloat16)
    read = moe.Routed(logits, TOP, True).counts.count_nonzero().item()
    taken = seconds(
        lambda: moe.experts(x, logits, gate_ups, downs, TOP, True, torch.bfloat16), calls=4
    )
    return {
        "kernel": "experts fp8, Mixtral-8x7B",
        "shape": f"{tokens} tokens, {read} of {EXPERTS} experts",
        "seconds": taken,
        "bytes": 3 * read * HIDDEN * INNER,
    }


def decode(sequences: int, context: int, dtype: torch.dtype, device: torch.device) -> Row:
    heads = Heads(32, 8, 128, None, None)
    each = -(-context // BLOCK)
    blocks = np.random.default_rng(0).permutation(sequences * each).astype(np.int32)
    geometry = KVGeometry(1, heads.num_kv_heads, 128, 128, (None,))
    cache = KVCache.allocate(geometry, len(blocks), BLOCK, dtype, device).layers[0]
    index = np.arange(sequences)
    spans = np.stack((index, index * 0 + context - 1, index * 0 + 1, index * each), axis=1)
    step = plan_pages(spans, blocks, BLOCK).to(device)
    query = torch.randn(sequences, 32, 128, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(query)
    taken = seconds(lambda: attention.decode(query, heads, cache, step, out))
    name = "bf16" if dtype == torch.bfloat16 else "fp8"
    return {
        "kernel": f"decode attention, {name} keys and values, 32 heads over 8",
        "shape": f"{sequences} x {context}",
        "seconds": taken,
        "bytes": sequences * context * 2 * 8 * 128 * dtype.itemsize,
    }


def product(tokens: int, n: int, k: int, fp8: bool, device: torch.device) -> Row:
    """In turn over copies that exceed the L2 together."""
    copies = max(1, (256 << 20) // (n * k))
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, n, device=device, dtype=torch.bfloat16)
    weights: list[Tensor | Fp8Matrix]
    if fp8:
        rows = quantise_rows(x)
        weights = [
            Fp8Matrix(random_fp8(n, k, device=device), torch.ones(n, 1, device=device))
            for _ in range(copies)
        ]
    else:
        weights = [torch.randn(n, k, device=device, dtype=x.dtype) for _ in range(copies)]

    def all_copies() -> None:
        for weight in weights:
            linear.linear(rows if fp8 else x, weight, out=out)

    taken = seconds(all_copies, calls=1) / copies
    return {
        "kernel": f"product {'fp8' if fp8 else 'bf16'}",
        "shape": f"{tokens} x {k} x {n}",
        "seconds": taken,
        "bytes": n * k * (1 if fp8 else 2),
    }
