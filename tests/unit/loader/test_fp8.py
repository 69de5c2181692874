"""Which matrices become fp8, how large they are, and what stops it."""

from types import SimpleNamespace

import pytest
import torch

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError
from scalellm.kernels.linear import Fp8Matrix, linear
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader.fp8 import Fp8Source, fp8_bytes, fp8_obstacle
from scalellm.loader.load import check_fp8
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
