"""Device and number type, and the reason that is given for them."""

import pytest
import torch

from scalellm.errors import ConfigError, UnsupportedModelError
from scalellm.loader.device import choose_device, choose_dtype, cpu_has_bf16

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("checkpoint", "device", "fast", "expected", "reason"),
    [
        ("bfloat16", CPU, True, torch.bfloat16, "the checkpoint's type"),
        ("bfloat16", CPU, False, torch.float32, "no bf16 instructions"),
        ("bfloat16", GPU, False, torch.bfloat16, "the checkpoint's type"),
        ("float16", CPU, True, torch.bfloat16, "float16 checkpoint"),
        ("float16", CPU, False, torch.float32, "no bf16 instructions"),
        ("float32", CPU, True, torch.float32, "the checkpoint's type is float32"),
        (None, CPU, True, torch.float32, "not named"),
    ],
)
def test_auto(checkpoint, device, fast, expected, reason):
    dtype, words = choose_dtype("auto", checkpoint, device, fast)
    assert dtype == expected
    assert reason in words


def test_requests_are_followed():
    assert choose_dtype("float32", "bfloat16", CPU, True)[0] == torch.float32
    assert choose_dtype("bfloat16", "float32", CPU, False)[0] == torch.bfloat16


def test_exotic_checkpoints_are_refused():
    with pytest.raises(UnsupportedModelError, match="float8_e4m3fn"):
        choose_dtype("auto", "float8_e4m3fn", CPU, True)


def test_absent_gpu_is_refused():
    if torch.cuda.is_available():
        assert choose_device("cuda").type == "cuda"
    else:
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


def test_asking_the_cpu_gives_an_answer():
    assert cpu_has_bf16() in (True, False)
