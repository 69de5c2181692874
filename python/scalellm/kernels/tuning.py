"""Shapes of tiles: measured ones from a file for each GPU, else ones that are reasonable.

A file is `tuned/NVIDIA_H200.toml`, named for the GPU; `benchmarks/tune_gpu.py` writes it:

    [[tile]]
    kernel = "linear fp8"
    n = 6144
    k = 4096
    rows = 16                  # up to so many, from the next smaller entry on
    tile = [16, 64, 128]       # rows, outputs, k
    warps = 4
    stages = 4

    [[prefill]]                # prompts' attention: the faster one, where both can be had
    heads = 32
    kv_heads = 8
    head_dim = 128
    kv = "bfloat16"
    windowed = false
    by = "flashinfer"          # or "triton"
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

import torch

_MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes, and with what."""

    rows: int
    outputs: int
    k: int
    warps: int
    stages: int


Measured = Mapping[tuple[str, int, int], Sequence[tuple[int, Tile]]]  # kernel, n, k -> by rows
Attended = tuple[int, int, int, str, bool]  # heads, kv heads, head_dim, type of these, windowed
PREFILLS = ("triton", "flashinfer")


def tile_for(kernel: str, rows: int, n: int, k: int, device: torch.device, copies: int = 1) -> Tile:
    """The tile of `kernel` ("linear bf16", "experts fp8", ...) for `rows` rows and [n, k] weights;
    for experts `rows` is how many one of them has to expect, and `copies` how many of them read."""
    if device.type == "cuda":
        measured = tiles_of(_name_of(device))
        for up_to, tile in measured.get((kernel, n, k), ()):
            if rows <= up_to:
                return tile
    return default_tile(kernel, rows, n * copies)


@cache
def default_tile(kernel: str, rows: int, n: int) -> Tile:
    """Few rows are bound by reading weights: narrow tiles, so that all multiprocessors read."""
    k = 128 if kernel.endswith("fp8") else 64
    if rows > 64:
        return Tile(128, 128, k, 8, 3)
    outputs = 128
    while outputs > 16 and -(-n // outputs) < _MULTIPROCESSORS:
        outputs //= 2
    return Tile(16 if rows <= 16 else 32 if rows <= 32 else 64, outputs, 128, 4, 4)


@cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def tiles_of(gpu: str) -> Measured:
    """What was measured on the GPU that calls itself `gpu`."""
    return parse_tiles(_tuned(gpu))


def _tuned(gpu: str) -> str:
    file = resources.files("scalellm.kernels") / "tuned" / f"{file_name(gpu)}.toml"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def fastest_prefill(
    device: torch.device, shape: tuple[int, int, int], kv: torch.dtype, window: int | None
) -> str:
    """Which of PREFILLS was measured to be the faster one on such a GPU, for `shape` (heads, kv
    heads, head_dim); Triton's by itself."""
    attended = (*shape, type_name(kv), window is not None)
    return parse_prefills(_tuned(_name_of(device))).get(attended, PREFILLS[0])


def parse_prefills(text: str) -> Mapping[Attended, str]:
    names = ("heads", "kv_heads", "head_dim", "kv", "windowed")
    entries = tomllib.loads(text).get("prefill", ())
    return {tuple(entry[name] for name in names): entry["by"] for entry in entries}


def type_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def parse_tiles(text: str) -> Measured:
    found: dict[tuple[str, int, int], list[tuple[int, Tile]]] = {}
    for entry in tomllib.loads(text).get("tile", ()):
        key = (entry["kernel"], entry["n"], entry["k"])
        rows, outputs, k = entry["tile"]
        tile = Tile(rows, outputs, k, entry["warps"], entry["stages"])
        found.setdefault(key, []).append((entry["rows"], tile))
    return MappingProxyType(
        {key: sorted(tiles, key=lambda tile: tile[0]) for key, tiles in found.items()}
    )


def file_name(gpu: str) -> str:
    """`NVIDIA H200` -> NVIDIA_H200"""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_")
