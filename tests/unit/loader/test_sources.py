"""Random weights: equal for a seed, sane in size, quick."""

import time

import pytest
import torch

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor
from scalellm.loader.config import read_model_config
from scalellm.loader.sources import DummySource, InventorySource
from scalellm.models.registry import build

CPU = torch.device("cpu")


def test_inventory_lists_every_tensor_and_uses_no_memory(make_folder):
    from scalellm.loader.checkpoint import Checkpoint

    folder = make_folder()
    inventory = InventorySource(torch.bfloat16)
    build(read_model_config(folder), inventory)
    stored = Checkpoint.open(folder)
    assert inventory.shapes == {name: tensor.shape for name, tensor in stored.tensors.items()}
    assert inventory.bytes == 2 * stored.numbers


def test_dummy_depends_on_seed_and_name_alone():
    def draw(seed, name, first=None):
        source = DummySource(seed, torch.float32, CPU)
        if first:
            source.fill(torch.empty(3, 5), first)
        out = torch.empty(7, 11)
        source.fill(out, name)
        return out

    assert torch.equal(draw(1, "a"), draw(1, "a", first="b"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))


def test_dummy_matrices_keep_activations_at_unit_size():
    source = DummySource(0, torch.float32, CPU)
    weight = torch.empty(3000, 2000)  # more numbers than the pool
    source.fill(weight, "w.weight")
    x = torch.randn(8, 2000)
    assert (x @ weight.T).std() == pytest.approx(1.0, rel=0.05)
    norm, bias = torch.empty(9), torch.empty(9)
    source.fill(norm, "norm.weight")
    source.fill(bias, "q_proj.bias")
    assert norm.tolist() == [1.0] * 9
    assert bias.tolist() == [0.0] * 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_model_answers_from_config_alone(make_folder, dtype):
    folder = make_folder(weights=None)

    def logits(seed):
        config = EngineConfig(
            model_path=folder, load_format="dummy", device="cpu", dtype=dtype, seed=seed
        )
        return SingleExecutor.load(config).forward(Batch((Span([1, 2, 3], 0, [0], 3),)))

    found = logits(0)
    assert torch.equal(found, logits(0))
    assert not torch.equal(found, logits(1))
    assert 0.1 < found.std() < 10
    assert found.dtype == torch.float32


def test_dummy_is_drawn_at_the_speed_of_memory():
    source = DummySource(0, torch.bfloat16, CPU)
    out = torch.empty(4096, 8192, dtype=torch.bfloat16)
    source.fill(out, "warm")
    started = time.perf_counter()
    source.fill(out, "timed")
    assert time.perf_counter() - started < 2.0, "34 million numbers"
