"""Models divided among ranks that Triton's kernels compute, beside the whole model by torch."""

from dataclasses import replace

import pytest
import torch

from scalellm.executor.batch import Batch, Span
from scalellm.executor.inputs import build_arrays, build_step
from scalellm.executor.paged_inputs import build_paged_step
from scalellm.kernels import device
from scalellm.kernels.attention import KVCache
from scalellm.layers.shard import Shard
from scalellm.loader.fp8 import Fp8Source
from scalellm.loader.sources import DummySource
from scalellm.models.registry import build

BLOCK = 4
BATCH = Batch(
    (
        Span([5, 60, 7, 8, 9], 0, [1, 4], 2),
        Span([3], 0, [7], 1),
    )
)


def whole(config, source, where, monkeypatch):
    """Logits by torch, in one process."""
    with monkeypatch.context() as patch:
        patch.setattr(device, "on_gpu", lambda _x: False)
        cache = KVCache.allocate(config.kv_geometry, 8, BLOCK, torch.float32, where)
        arrays = build_arrays(BATCH, BLOCK, 8)
        ids, step = build_step(arrays, cache, config.kv_geometry, torch.float32, where)
        return build(config, source).forward(ids, step)


def divided(config, ranks, where, expert_parallel=False, fp8=False):
    """What a rank does for its logits, by Triton's kernels."""

    def work(rank, exchange):
        shard = Shard(rank, ranks, expert_parallel, exchange=exchange)
        source = DummySource(3, torch.float32, where, shard)
        model = build(config, Fp8Source(source) if fp8 else source)
        cache = KVCache.allocate(model.geometry, 8, BLOCK, torch.float32, where)
        ids, step = build_paged_step(build_arrays(BATCH, BLOCK, 8), cache, where)
        return model.forward(ids, step)

    return work


@pytest.mark.parametrize(
    ("kind", "vocab_size", "ranks", "expert_parallel"),
    [
        ("dense", 150, 4, False),  # two ranks for each key-value head
        ("sparse", 67, 2, False),
        ("sparse", 67, 2, True),
    ],
)
def test_ranks_get_what_one_gets(
    kind, vocab_size, ranks, expert_parallel, shapes, on_ranks, where, monkeypatch
):
    config = replace(shapes[kind], vocab_size=vocab_size)
    found = on_ranks(ranks, divided(config, ranks, where, expert_parallel))
    expected = whole(config, DummySource(3, torch.float32, where), where, monkeypatch)
    for one in found:
        assert torch.equal(one, found[0])
        torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_in_fp8(expert_parallel, shapes, on_ranks, where, monkeypatch):
    """Which the interpreter rounds badly, as in test_model.py."""
    config = shapes["sparse"]
    found = on_ranks(2, divided(config, 2, where, expert_parallel, fp8=True))
    source = Fp8Source(DummySource(3, torch.float32, where))
    expected = whole(config, source, where, monkeypatch)
    assert torch.equal(found[0], found[1])
    assert (found[0] - expected).norm() / expected.norm() < 0.5
