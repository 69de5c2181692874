"""Prompts' attention by FlashInfer, where it is installed and was measured to be faster.

Its kernels read the cache as cache.py draws it, which FlashInfer calls HND. The host plans a step
once for each window; all layers of that window run by the plan:

    q             the rows of all spans of several tokens, which have to lie next to each other
    qo_indptr     [n + 1]  where each span's rows begin among these
    kv_indptr     [n + 1]  where each span's blocks begin among kv_indices
    kv_indices             their blocks, one span's after the other
    last_page_len [n]      tokens in each one's last block

Causal means here what it means to a chunk: a span's last query sees the sequence's last key.
flash-attn is left out: with pages it wants blocks of a multiple of 256 tokens.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.kernels.attention.cache import KVGeometry, LayerCache
from scalellm.kernels.attention.heads import Heads
from scalellm.kernels.attention.paged import Ints, plan_pages
from scalellm.kernels.tuning import fastest_prefill

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)  # that its kernels are instantiated for
_WORKSPACE_BYTES = 128 << 20  # as it recommends: partial sums of split keys
_LARGEST_ERROR = 0.02  # of a number x, in 1 + |x|, beside Triton's kernel; bf16 rounds at 0.004


class Wrapper(Protocol):
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, as far as it is used."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """The tensors int32, on the host. `window_left`: keys seen before a query; -1: all."""

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        """q, out [rows, heads, head_dim]; keys, values [blocks, kv heads, page_size, head_dim]."""


@dataclass(frozen=True, slots=True)
class PrefillArrays:
    """What FlashInfer plans by, on the host."""

    first_row: int  # of the batch
    qo_indptr: Ints
    kv_indptr: Ints
    kv_indices: Ints
    last_page_len: Ints

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + int(self.qo_indptr[-1]))


def plan_prefill(
    spans: npt.NDArray[np.int64], tables: npt.NDArray[np.int32], block_size: int
) -> PrefillArrays | None:
    """Of the spans of several tokens among `spans` [S, 4], as of executor.inputs.StepArrays.

    None where there are none, or others lie between them."""
    several = np.flatnonzero(spans[:, 2] > 1)
    if not len(several) or several[-1] - several[0] >= len(several):
        return None
    firsts, starts, counts, begins = spans[several].T
    ends = starts + counts
    blocks = -(-ends // block_size)
    kv_indptr = np.append(0, blocks.cumsum())
    # Tables may have more blocks than there are tokens for.
    places = np.arange(kv_indptr[-1]) + np.repeat(begins - kv_indptr[:-1], blocks)
    return PrefillArrays(
        int(firsts[0]),
        np.append(0, counts.cumsum()).astype(np.int32),
        kv_indptr.astype(np.int32),
        tables[places],
        (ends - (blocks - 1) * block_size).astype(np.int32),
    )


@dataclass(frozen=True, slots=True)
class PlannedPrefill:
    """A step's prompts, planned for every window."""

    rows: slice
    wrappers: MappingProxyType[int | None, Wrapper]

    def run(self, query: Tensor, heads: Heads, cache: LayerCache, out: Tensor) -> None:
        """Of these rows of `query` [T, heads, head_dim], into `out`."""
        wrapper = self.wrappers[heads.window]
        wrapper.run(query[self.rows], (cache.keys, cache.values), out=out[self.rows])


class FlashInferPrefill:
    """Plans steps of one model on one device. Its buffers are those of the last step it planned."""

    def __init__(
        self,
        package: Any,
        heads: Heads,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`package`: flashinfer; `heads`: as each layer has them but for the window."""
        self._heads, self._dtype, self._kv_dtype = heads, dtype, kv_dtype
        made = package.BatchPrefillWithPagedKVCacheWrapper
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: MappingProxyType[int | None, Wrapper] = MappingProxyType(
            {window: made(workspace, "HND") for window in dict.fromkeys(windows)}
        )
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def plan(
        self, spans: npt.NDArray[np.int64], tables: npt.NDArray[np.int32], block_size: int
    ) -> PlannedPrefill | None:
        """As `plan_prefill`, and have the device told."""
        found = plan_prefill(spans, tables, block_size)
        if found is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()  # a plan is copied out of one buffer, step after step
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                torch.from_numpy(found.qo_indptr),
                torch.from_numpy(found.kv_indptr),
                torch.from_numpy(found.kv_indices),
                torch.from_numpy(found.last_page_len),
                self._heads.num_heads,
                self._heads.num_kv_heads,
                self._heads.head_dim,
                block_size,
                causal=True,
                sm_scale=self._heads.scale,
                window_left=-1 if window is None else window - 1,
                q_data_type=self._dtype,
                kv_data_type=self._kv_dtype,
            )
        if self._copied is not None:
            self._copied.record()
        return PlannedPrefill(found.rows, self._wrappers)


def open_prefill(
    num_heads: int,
    geometry: KVGeometry,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> FlashInferPrefill | None:
    """What computes prompts' attention in place of Triton's kernel; None where that one does.

    It does unless FlashInfer was measured to be faster on such a GPU, is there, and gives the same
    numbers."""
    heads = Heads(num_heads, geometry.num_kv_heads, geometry.key_dim, None, None)
    windows = tuple(dict.fromkeys(geometry.windows))
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
    if device.type != "cuda" or any(
        fastest_prefill(device, shape, kv_dtype, window) != "flashinfer" for window in windows
    ):
        return None
    if (reason := obstacle(heads, geometry.value_dim, dtype, kv_dtype)) is not None:
        logger.info("FlashInfer is not used: %s", reason)
        return None
    try:
        package = importlib.import_module("flashinfer")
        made = FlashInferPrefill(package, heads, windows, dtype, kv_dtype, device)
        error = largest_error(made, heads, windows, block_size, dtype, kv_dtype, device)
    except Exception as problem:
        # Whatever a package of another version, or its compiler, raises: there are other kernels.
        logger.warning("FlashInfer is not used: %s: %s", type(problem).__name__, problem)
        return None
    if not error <= _LARGEST_ERROR:
        logger.warning("FlashInfer is not used: it is %g off Triton's kernel", error)
        return None
    return made


def obstacle(heads: Heads, value_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> str | None:
    """Why its kernels cannot compute this; None if they can."""
    if heads.head_dim not in HEAD_DIMS or value_dim != heads.head_dim:
        allowed = ", ".join(map(str, HEAD_DIMS))
        return f"heads of {heads.head_dim} and {value_dim} numbers; it has kernels for {allowed}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"queries of {dtype}; it has kernels for bfloat16 and float16"
    if kv_dtype not in (dtype, torch.float8_e4m3fn):
        return f"keys and values of {kv_dtype}; it has kernels for {dtype} and float8_e4m3fn"
    return None


def largest_error(
    made: FlashInferPrefill,
    heads: Heads,
    windows: Sequence[int | None],
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Beside Triton's kernel, over a whole prompt and a continued one, on random numbers; not a
    number where one of them is none."""
    from scalellm.kernels.attention import triton

    spans = np.array([[0, 0, 67, 0], [67, 300, 45, -(-67 // block_size)]])
    count = spans[1, 3] + -(-345 // block_size)
    tables = np.random.default_rng(0).permutation(count).astype(np.int32)
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    kv = (int(count), heads.num_kv_heads, block_size, heads.head_dim)
    cache = LayerCache(numbers(*kv).to(kv_dtype), numbers(*kv).to(kv_dtype))
    query = numbers(112, heads.num_heads, heads.head_dim).to(dtype)
    step = plan_pages(spans, tables, block_size).to(device)
    planned = made.plan(spans, tables, block_size)
    if planned is None:
        raise ValueError("two prompts are not next to each other")
    errors = []
    for window in windows:
        shaped = Heads(heads.num_heads, heads.num_kv_heads, heads.head_dim, window, None)
        found, expected = torch.empty_like(query), torch.empty_like(query)
        planned.run(query, shaped, cache, found)
        triton.prefill(query, shaped, cache, step, expected)
        difference = (found.float() - expected.float()).abs() / (1 + expected.float().abs())
        errors.append(difference.max())
    return float(torch.stack(errors).max().item())
