"""Which matrices become fp8, how large they are, and what stops it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError
from scalellm.kernels.linear import Fp8Matrix, linear
from scalellm.layers.shard import WHOLE, Shard
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader.checkpoint import Checkpoint, CheckpointSource
from scalellm.loader.fp8 import Fp8Source, fp8_bytes, fp8_obstacle
from scalellm.loader.load import check_fp8, keeps_fp8
from scalellm.loader.quantised import ScaledBytes
from scalellm.loader.sources import DummySource, InventorySource

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = MatrixSpec((("a", 24), ("b", 8)), 40, Use.COLUMN)


def test_each_output_has_a_scale_and_its_largest_weight_is_exact():
    plain = DummySource(1, torch.float32, CPU).matrix(SPEC)
    matrix = Fp8Source(DummySource(1, torch.float32, CPU)).matrix(SPEC)
    assert isinstance(matrix, Fp8Matrix) and not matrix.blocked
    assert matrix.data.nbytes + matrix.scales.nbytes == fp8_bytes(SPEC)
    back = matrix.dequantised(torch.float32)
    largest = plain.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(back.gather(1, largest), plain.gather(1, largest))
    assert ((back - plain).abs() <= plain.abs() / 16 + matrix.scales * 2**-9).all()


@pytest.mark.parametrize("use", [Use.ROUTER, Use.OUTPUT])
def test_routers_and_output_layers_stay(use):
    source = Fp8Source(DummySource(1, torch.float32, CPU))
    assert isinstance(source.matrix(MatrixSpec((("a", 8),), 4, use)), torch.Tensor)


def test_the_inventory_knows_their_size():
    inventory = InventorySource(torch.bfloat16, fp8=True)
    inventory.matrix(SPEC)
    inventory.matrix(MatrixSpec((("router", 8),), 40, Use.ROUTER))
    assert inventory.bytes == fp8_bytes(SPEC) + 2 * 8 * 40


def test_without_a_gpu_they_are_multiplied_as_what_they_stand_for():
    matrix = Fp8Source(DummySource(1, torch.float32, CPU)).matrix(SPEC)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(x, matrix), x @ matrix.dequantised(torch.float32).T)


@pytest.mark.parametrize(
    ("device", "family", "dtype", "capability", "reason"),
    [
        (CPU, "llama", torch.bfloat16, None, "runs on a GPU, and the model is on cpu"),
        (CUDA, "transformers", torch.bfloat16, (9, 0), "has no kernels"),
        (CUDA, "llama", torch.float32, (9, 0), "needs --dtype bfloat16, not float32"),
        (CUDA, "llama", torch.bfloat16, (8, 0), "compute capability 8.9 (Ada, Hopper), not 8.0"),
        (CUDA, "llama", torch.bfloat16, (8, 9), None),
        (CUDA, "mixtral", torch.bfloat16, (9, 0), None),
    ],
)
def test_what_stops_it(device, family, dtype, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    found = fp8_obstacle(device, family, dtype)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("flag", ["quantization", "kv_cache_dtype"])
def test_the_flag_is_named(flag):
    config = EngineConfig(**{flag: "fp8"})
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} fp8 runs on a GPU"):
        check_fp8(config, SimpleNamespace(family="llama"), torch.bfloat16, CPU)


STORED = MatrixSpec((("a", 128), ("b", 40)), 200, Use.COLUMN)
SCHEMES = {
    "channels": (ScaledBytes("fp8", "F8_E4M3", "weight_scale"), lambda n: (n, 1)),
    "tensor": (ScaledBytes("fp8", "F8_E4M3", "weight_scale"), lambda _n: ()),
    "blocks": (
        ScaledBytes("fp8", "F8_E4M3", "weight_scale_inv", (128, 128)),
        lambda n: (-(-n // 128), 2),
    ),
}


def stored(folder, scheme, shape_of, spec, shard=WHOLE):
    """A source of a checkpoint of random fp8 matrices, or of a rank's part of it."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, n in spec.parts:
        numbers = torch.randn(n, spec.k, generator=generator)
        tensors[f"{name}.weight"] = numbers.to(torch.float8_e4m3fn)
        tensors[f"{name}.{scheme.marker}"] = torch.rand(shape_of(n), generator=generator) + 0.1
    save_file(tensors, folder / "model.safetensors")
    return CheckpointSource(Checkpoint.open(folder, scheme), torch.float32, CPU, shard)


@pytest.mark.parametrize("kind", SCHEMES)
def test_fp8_checkpoints_stay_as_they_are(kind, tmp_path):
    with stored(tmp_path, *SCHEMES[kind], STORED) as source:
        found = Fp8Source(source).matrix(STORED)
        assert isinstance(found, Fp8Matrix) and found.blocked is (kind == "blocks")
        assert torch.equal(found.dequantised(torch.float32), source.matrix(STORED))


def test_blocks_that_reach_into_the_next_part_are_quantised_anew(tmp_path):
    spec = MatrixSpec((("a", 40), ("b", 128)), 200, Use.COLUMN)
    with stored(tmp_path, *SCHEMES["blocks"], spec) as source:
        found = Fp8Source(source).matrix(spec)
        assert isinstance(found, Fp8Matrix) and not found.blocked


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize(
    ("spec", "blocks_fit"),
    [
        (MatrixSpec((("a", 256), ("b", 256)), 200, Use.GATED), True),
        (MatrixSpec((("a", 256), ("b", 128)), 200, Use.GATED), False),
        (MatrixSpec((("a", 40),), 256, Use.ROW), True),
        (MatrixSpec((("a", 40),), 200, Use.ROW), False),
    ],
    ids=["rows", "half blocks of rows", "columns", "half blocks of columns"],
)
def test_a_ranks_part_stays_as_it_is_where_blocks_begin_with_it(kind, spec, blocks_fit, tmp_path):
    scheme, shape_of = SCHEMES[kind]
    if kind == "blocks":

        def shape_of(n):
            return -(-n // 128), -(-spec.k // 128)

    shard = Shard(1, 2)
    with stored(tmp_path, scheme, shape_of, spec, shard) as source:
        found = Fp8Source(source).matrix(spec)
        exact = source.matrix(spec)
        assert isinstance(found, Fp8Matrix)
        assert found.blocked is (kind == "blocks" and blocks_fit)
        if kind != "blocks" or blocks_fit:
            assert torch.equal(found.dequantised(torch.float32), exact)
        else:
            error = (found.dequantised(torch.float32) - exact).abs()
            assert (error <= exact.abs() / 16 + exact.abs().amax(-1, keepdim=True) * 2**-10).all()


@pytest.mark.parametrize(
    ("asked", "dtype", "kept"),
    [("auto", "F8_E4M3", True), ("none", "F8_E4M3", False), ("auto", "I8", False)],
)
def test_a_checkpoint_of_fp8_stays_so_unless_asked_otherwise(asked, dtype, kept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    model, scheme = SimpleNamespace(family="llama"), ScaledBytes("a", dtype, "weight_scale")
    config = EngineConfig(quantization=asked)
    assert keeps_fp8(config, scheme, model, torch.bfloat16, CUDA) is kept
    assert not keeps_fp8(config, scheme, model, torch.bfloat16, CPU)
