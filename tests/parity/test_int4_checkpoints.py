"""Checkpoints of int4 with scales and zeros of groups: they stay what they are."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.load import load_executor
from scalellm.kernels.linear import logits as product
from scalellm.layers.shard import Shard
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader.checkpoint import Checkpoint, CheckpointSource
from scalellm.loader.config import read_quantisation
from scalellm.loader.packed_cache import PackedCache
from scalellm.loader.packing import Packing, PackingSource
from scalellm.loader.sharding import ShardSource
from scalellm.loader.sources import InventorySource

from .quantised_checkpoints import IDS, awq, config_of, gptq, logits, write, write_plain

# Inputs of o_proj and down_proj are 8 runs of 32 and of 64: a part of groups of 128.
CONFIG = config_of(hidden_size=256, intermediate_size=512, num_attention_heads=8)
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
SPECS = (
    MatrixSpec(
        tuple((f"{ATTENTION}.{part}_proj", n) for part, n in (("q", 256), ("k", 64), ("v", 64))),
        256,
        Use.COLUMN,
        heads=(8, 2, 2),
    ),
    MatrixSpec(((f"{ATTENTION}.o_proj", 256),), 256, Use.ROW),
    MatrixSpec(tuple((f"{MLP}.{part}_proj", 512) for part in ("gate", "up")), 256, Use.COLUMN),
    MatrixSpec(((f"{MLP}.down_proj", 256),), 512, Use.ROW),
)
MATRICES = 2 * 4 + 1  # of the layers (qkv, o, gate and up, down), and the output layer


def of_awq(group):
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return lambda w: awq(w, group), config


def of_gptq(group=128, **how):
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False}
    return lambda w: gptq(w, group=w.shape[1] if group == -1 else group, **how), config


KEPT = {
    "awq 32": of_awq(32),
    "awq 64": of_awq(64),
    "awq 128": of_awq(128),
    "awq 256": of_awq(256),
    "gptq": of_gptq(),
    "gptq symmetric": of_gptq(symmetric=True),
    "gptq of one group": of_gptq(-1),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain(CONFIG, tmp_path_factory.mktemp("plain"), torch.bfloat16)


@pytest.fixture(scope="module")
def folders(plain, tmp_path_factory):
    """Folders of a format: quantised, and the numbers that this is."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = write(plain, tmp_path_factory.mktemp("int4"), *KEPT[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", KEPT)
def test_packed_numbers_are_the_checkpoints(folders, name):
    """A row of one 1 and zeros gives a column of the matrix, but for float32's last bits."""
    quantised, numbers = folders(name)
    tensors = load_file(numbers / "model.safetensors")
    checkpoint = Checkpoint.open(quantised, read_quantisation(quantised))
    packing = Packing("int8", checkpoint.int4_groups())
    with CheckpointSource(checkpoint, torch.bfloat16, torch.device("cpu")) as source:
        for spec in SPECS:
            packed = PackingSource(source, packing).matrix(spec)
            assert packed.layout.format == "int4-zeros"
            assert packed.layout.groups == (8 if spec.use is Use.ROW else 1)
            found = product(torch.eye(spec.k).bfloat16(), packed).t()
            exact = torch.cat([tensors[f"{name}.weight"] for name, _ in spec.parts])
            torch.testing.assert_close(found, exact, atol=0, rtol=5e-7)


def test_a_mapped_file_has_the_same_parts_for_each_rank(folders, tmp_path):
    folder, _ = folders("awq 128")
    checkpoint = Checkpoint.open(folder, read_quantisation(folder))
    packing = Packing("int8", checkpoint.int4_groups())
    plans = []
    for one in (packing, Packing("int8")):
        inventory = InventorySource(torch.bfloat16, one)
        for spec in SPECS:
            inventory.matrix(spec)
        plans.append(inventory.plan)
    cache = PackedCache(tmp_path, 1 << 30)
    with CheckpointSource(checkpoint, torch.bfloat16, torch.device("cpu")) as plain:
        source = PackingSource(plain, packing)
        mapped, path, _ = cache.weights(
            "m", [1], plans[0], torch.bfloat16, lambda: nullcontext(source)
        )
        for rank in range(2):
            from_file = ShardSource(mapped, Shard(rank, 2), keep_views=True)
            in_memory = ShardSource(source, Shard(rank, 2), keep_views=False)
            for spec in SPECS:
                found, expected = from_file.matrix(spec), in_memory.matrix(spec)
                assert found.layout == expected.layout
                assert torch.equal(found.data, expected.data)
                if spec.use is Use.ROW:
                    storage = mapped.matrix(spec).data.untyped_storage()
                    assert found.data.untyped_storage().data_ptr() == storage.data_ptr(), "a view"
        as_int8 = PackingSource(plain, Packing("int8"))
        _, other, _ = cache.weights(
            "m", [1], plans[1], torch.bfloat16, lambda: nullcontext(as_int8)
        )
    assert path != other, "a file of int8 is not taken for int4"


@pytest.mark.parametrize("name", KEPT)
def test_logits_are_those_of_the_numbers(folders, name):
    """Within the error of int8 activations and an int8 output layer."""
    quantised, numbers = folders(name)
    exact, _ = logits(numbers, dtype="float32")
    found, said = logits(quantised)
    assert f"int4, {MATRICES - 1} of {MATRICES} matrices stay so" in said
    assert "int4+int8 weights" in said
    assert (found - exact).square().mean().sqrt() < 0.04 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    ("quantization", "kept", "called"),
    [("auto", 8, "int4+int8"), ("int4", 8, "int4"), ("int8", None, "int8"), ("none", None, "none")],
)
def test_what_is_asked_for_decides(folders, quantization, kept, called):
    said = []
    config = EngineConfig(
        model_path=folders("awq 128")[0], device="cpu", quantization=quantization,
        kv_cache_memory_bytes=4 << 20, packed_cache="none",
    )  # fmt: skip
    executor = load_executor(config, lambda phase, _seconds: said.append(phase))
    executor.close()
    assert executor.quantization == called
    assert (kept is not None) == ("stay so" in " ".join(said))


@pytest.mark.parametrize(
    ("writer", "config", "kept"),
    [
        (*of_gptq(shuffled=True), 0),
        (
            lambda w: gptq(w, bits=8),
            {"quant_method": "gptq", "bits": 8, "group_size": 32},
            0,
        ),
        (*of_awq(16), 0),
    ],
    ids=["in another order", "of 8 bits", "of small groups"],
)
def test_what_the_kernels_do_not_have_becomes_int8(plain, tmp_path, writer, config, kept):
    quantised, numbers = write(plain, tmp_path, writer, config)
    exact, _ = logits(numbers, dtype="float32")
    found, said = logits(quantised)
    assert f"{kept} of {MATRICES} matrices stay so" in said
    assert (found - exact).square().mean().sqrt() < 0.06 * exact.square().mean().sqrt()


def load(folder, ranks=1, **settings):
    config = EngineConfig(
        model_path=folder, device="cpu", tensor_parallel_size=ranks, cpu_threads=ranks,
        kv_cache_memory_bytes=4 << 20, packed_cache="none", **settings,
    )  # fmt: skip
    return load_executor(config)


def results(executor):
    """Logits of a prompt at once, in chunks beside another, and token by token."""
    span = Span(IDS, 0, range(3), len(IDS))
    found = [executor.forward(Batch((span,))).clone()]
    table, beside = range(3, 6), range(6, 9)
    for first, last in ((0, 7), (7, 33), (33, 34), (34, 35), (35, len(IDS))):
        spans = (
            Span(IDS[first:last], first, table, last - first),
            Span(IDS[::-1], 0, beside, 0),
        )
        found.append(executor.forward(Batch(spans)).clone())
    return found[0], torch.cat(found[1:])


@pytest.mark.parametrize("name", ["awq 128", "gptq"])
def test_bits_are_equal_alone_batched_chunked_eager_and_on_several_ranks(folders, name):
    folder, _ = folders(name)
    expected = None
    for settings in ({}, {"enforce_eager": True}, {"ranks": 2}, {"ranks": 4}):
        executor = load(folder, **settings)
        try:
            at_once, in_chunks = results(executor)
        finally:
            executor.close()
        assert torch.equal(at_once, in_chunks)
        expected = at_once if expected is None else expected
        assert torch.equal(at_once, expected), settings
