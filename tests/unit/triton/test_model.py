"""Whole models by Triton's kernels beside torch: every layer's glue, over prompts and decodes."""

import pytest
import torch

from scalellm.executor.batch import Batch, Span
from scalellm.executor.inputs import build_arrays, build_step
from scalellm.executor.paged_inputs import build_paged_step
from scalellm.kernels import device
from scalellm.kernels.attention import KVCache
from scalellm.loader.fp8 import Fp8Source
from scalellm.loader.sources import DummySource
from scalellm.models.registry import build

BLOCK = 4


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_prompts_then_decodes(kind, shapes, where, monkeypatch):
    config, source = shapes[kind], DummySource(3, torch.float32, where)
    steps = [
        (Span([5, 6, 7, 8, 9], 0, [1, 4], 1), Span(list(range(11)), 0, [0, 2, 5], 1)),
        (Span([10], 5, [1, 4], 1), Span([20, 21], 11, [0, 2, 5, 3], 2)),
    ]
    found, expected = [], []
    caches = [
        KVCache.allocate(config.kv_geometry, 8, BLOCK, torch.float32, where) for _ in range(2)
    ]
    model = build(config, source)
    for spans in steps:
        arrays = build_arrays(Batch(spans), BLOCK, 8)
        ids, step = build_paged_step(arrays, caches[0], where)
        found.append(model.forward(ids, step))
    monkeypatch.setattr(device, "on_gpu", lambda _x: False)
    model = build(config, source)
    for spans in steps:
        arrays = build_arrays(Batch(spans), BLOCK, 8)
        ids, step = build_step(arrays, caches[1], config.kv_geometry, torch.float32, where)
        expected.append(model.forward(ids, step))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_fp8_weights_activations_and_cache(kind, shapes, where, monkeypatch):
    """Beside the same fp8 weights multiplied by torch, activations and cache as they are.

    Rounding, which the interpreter does badly, leaves a quarter; a misplaced scale leaves all."""
    config = shapes[kind]
    prompt = Span(list(range(20)), 0, [1, 4, 0, 2, 6], 20)
    arrays = build_arrays(Batch((prompt,)), BLOCK, 8)
    logits = []
    for dtype in (torch.float8_e4m3fn, torch.float32):
        cache = KVCache.allocate(config.kv_geometry, 8, BLOCK, dtype, where)
        model = build(config, Fp8Source(DummySource(3, torch.float32, where)))
        if dtype == torch.float32:
            ids, step = build_step(arrays, cache, config.kv_geometry, dtype, where)
        else:
            ids, step = build_paged_step(arrays, cache, where)
        logits.append(model.forward(ids, step))
        monkeypatch.setattr(device, "on_gpu", lambda _x: False)
    found, expected = logits
    assert found.isfinite().all()
    assert (found - expected).norm() / expected.norm() < 0.5
