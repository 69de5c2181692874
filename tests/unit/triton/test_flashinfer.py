"""Prompts' attention by FlashInfer beside torch's: by a stand-in that does in plain torch what the
package's documentation says, and by the package where it is installed and there is a GPU."""

import importlib
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scalellm.kernels.attention import Heads, KVGeometry, flashinfer
from scalellm.kernels.attention.flashinfer import (
    FlashInferPrefill,
    largest_error,
    obstacle,
    open_prefill,
    plan_prefill,
)

from .attention_case import Case

# Tokens before the step, and in it: decodes first, as the scheduler has them, then prompts.
SPANS = [(0, 1), (70, 1), (5, 3), (0, 67), (33, 20)]


class Wrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper as documented: queries are packed; a request's
    pages are kv_indices[kv_indptr[i] : kv_indptr[i + 1]], of which the last has last_page_len
    tokens; its last query is as far as its last key; window_left keys before a query are seen."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "HND"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, causal=False, sm_scale=None, window_left=-1,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(x.dtype == torch.int32 and x.device.type == "cpu" for x in arrays)
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert ((paged_kv_last_page_len > 0) & (paged_kv_last_page_len <= page_size)).all()
        self.arrays = [x.tolist() for x in arrays]
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.causal, self.scale, self.window_left = causal, sm_scale, window_left
        self.types = (q_data_type, kv_data_type or q_data_type)

    def run(self, q, paged_kv_cache, *, out):
        heads, kv_heads, dim, page = self.shape
        rows, pages, blocks, last = self.arrays
        assert q.shape == out.shape == (rows[-1], heads, dim)
        assert q.is_contiguous() and out.is_contiguous() and out.dtype == q.dtype
        assert (q.dtype, paged_kv_cache[0].dtype) == self.types
        assert all(part.shape[1:] == (kv_heads, page, dim) for part in paged_kv_cache)
        for at, tokens in enumerate(last):
            mine = blocks[pages[at] : pages[at + 1]]
            length = (len(mine) - 1) * page + tokens
            keys, values = (
                part[mine].float().transpose(1, 2).reshape(-1, kv_heads, dim)[:length]
                .repeat_interleave(heads // kv_heads, 1)
                for part in paged_kv_cache
            )  # fmt: skip
            queries = q[rows[at] : rows[at + 1]].float()
            position = torch.arange(length - len(queries), length, device=q.device)[:, None]
            key = torch.arange(length, device=q.device)
            seen = key <= position if self.causal else key >= 0
            if self.window_left >= 0:
                seen = seen & (key >= position - self.window_left)
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.scale
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            attended = torch.einsum("hqk,khd->qhd", weights, values)
            out[rows[at] : rows[at + 1]] = attended.to(out.dtype)
        return out


def stand_in(wrapper=Wrapper):
    return SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=wrapper)


@pytest.fixture(params=["stand-in", pytest.param("package", marks=pytest.mark.needs("flashinfer"))])
def package(request):
    return stand_in() if request.param == "stand-in" else importlib.import_module("flashinfer")


@pytest.mark.parametrize("window", [None, 9])
def test_a_mixed_step(package, window, numbers, where):
    """Decodes by Triton's kernel, prompts by the package."""
    heads = Heads(4, 2, 64, window, None)
    case = Case(numbers, where, SPANS, heads, block_size=16, dtype=torch.float16)
    made = FlashInferPrefill(package, heads, (window, 5), torch.float16, torch.float16, where)
    case.step = replace(case.step, prompts=made.plan(*case.arrays))
    case.check(1e-2)


def test_keys_and_values_in_fp8(package, where):
    heads = Heads(4, 2, 64, None, None)
    fp8 = torch.float8_e4m3fn
    made = FlashInferPrefill(package, heads, (None,), torch.float16, fp8, where)
    error = largest_error(made, heads, (None,), 16, torch.float16, fp8, where)
    assert error < 0.02


def test_a_package_that_computes_something_else_is_noticed(where):
    """One whose windows are a token wider, for one."""

    class Wider(Wrapper):
        def plan(self, *arrays, window_left=-1, **more):
            more["window_left"] = window_left + 1 if window_left >= 0 else -1
            super().plan(*arrays, **more)

    heads, half = Heads(2, 1, 64, None, None), torch.float16
    for wrapper, is_right in ((Wrapper, True), (Wider, False)):
        made = FlashInferPrefill(stand_in(wrapper), heads, (None, 9), half, half, where)
        error = largest_error(made, heads, (None, 9), 16, half, half, where)
        assert (error < 0.02) == is_right


def test_a_plan_by_hand():
    """Blocks of 4: a decode, a prompt that goes on at 5 in blocks 7, 2, 8 (and 6, still unused),
    and a whole one of 4 in block 9."""
    spans = np.array([[0, 3, 1, 0], [1, 5, 6, 1], [7, 0, 4, 5]])
    tables = np.array([1, 7, 2, 8, 6, 9], dtype=np.int32)
    plan = plan_prefill(spans, tables, 4)
    assert plan is not None
    assert plan.rows == slice(1, 11)
    assert plan.qo_indptr.tolist() == [0, 6, 10]
    assert plan.kv_indptr.tolist() == [0, 3, 4]
    assert plan.kv_indices.tolist() == [7, 2, 8, 9]
    assert plan.last_page_len.tolist() == [3, 4]


@pytest.mark.parametrize("counts", [(1, 1), (5, 1, 5)], ids=["none", "a decode between"])
def test_steps_that_stay_tritons(counts):
    sizes, at = np.array(counts), np.arange(len(counts))
    spans = np.stack((np.cumsum(sizes) - sizes, 0 * at, sizes, 2 * at), axis=1)
    assert plan_prefill(spans, np.arange(6, dtype=np.int32), 4) is None


def test_what_it_has_no_kernels_for():
    bf16, half, fp8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
    heads = Heads(32, 8, 128, None, None)
    assert obstacle(heads, 128, bf16, bf16) is None
    assert obstacle(heads, 128, bf16, fp8) is None
    assert "heads of 80" in str(obstacle(Heads(32, 8, 80, None, None), 80, bf16, bf16))
    assert "128 and 64" in str(obstacle(heads, 64, bf16, bf16))
    assert "queries of torch.float32" in str(obstacle(heads, 128, torch.float32, torch.float32))
    assert "keys and values of torch.float16" in str(obstacle(heads, 128, bf16, half))


@pytest.mark.parametrize(
    ("by", "package", "said"),
    [
        ("triton", None, ""),
        ("flashinfer", None, "FlashInfer is not used: ModuleNotFoundError"),
        ("flashinfer", SimpleNamespace(), "FlashInfer is not used: AttributeError"),
    ],
    ids=["not faster", "not installed", "another version"],
)
def test_without_it_prompts_are_tritons(by, package, said, monkeypatch, caplog):
    monkeypatch.setattr(flashinfer, "fastest_prefill", lambda *_: by)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    bf16 = torch.bfloat16
    geometry = KVGeometry(1, 8, 128, 128, (None,))
    assert open_prefill(32, geometry, 16, bf16, bf16, torch.device("cuda")) is None
    assert said in caplog.text
