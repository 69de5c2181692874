"""Whole models by Triton's kernels beside torch: every layer's glue, over prompts and decodes."""

from dataclasses import replace

import pytest
import torch

from scalellm.executor.batch import Batch, Span
from scalellm.executor.inputs import build_arrays, build_step
from scalellm.executor.paged_inputs import build_paged_step
from scalellm.kernels import device
from scalellm.kernels.attention import KVCache
from scalellm.layers.rotary import RopeConfig
from scalellm.loader.fp8 import Fp8Source
from scalellm.loader.sources import DummySource
from scalellm.models.config import ModelConfig, MoeConfig
from scalellm.models.registry import build

BLOCK = 4
DENSE = ModelConfig(
    architecture="Qwen3ForCausalLM",
    family="qwen3",
    vocab_size=67,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope=RopeConfig(10000.0, 16),
    max_position_embeddings=128,
    windows=(None, 8),
    tie_word_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    moe=None,
    checkpoint_dtype="float32",
    eos_token_ids=(0,),
)
SPARSE = replace(
    DENSE, family="mixtral", qk_norm=False, windows=(None, None),
    moe=MoeConfig(40, 4, 2, True, (True, True)),
)  # fmt: skip


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_prompts_then_decodes(config, where, monkeypatch):
    source = DummySource(3, torch.float32, where)
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


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_fp8_weights_activations_and_cache(config, where, monkeypatch):
    """Beside the same fp8 weights multiplied by torch, activations and cache as they are.

    Rounding, which the interpreter does badly, leaves a quarter; a misplaced scale leaves all."""
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
