"""Triton's kernels beside their references: on a GPU where there is one, else interpreted.

The interpreter computes bf16 and rounds to fp8 wrongly (docs/gpu.md), so kernels are run in fp32
and fp16 here, and fp8 is compared by what it stands for.
"""

import pytest
import torch

from scalellm.kernels import device
from scalellm.kernels.quantise import Fp8Rows

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        monkeypatch.setattr(device, "on_gpu", lambda _x: True)
        torch.set_num_threads(1)


@pytest.fixture
def where() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def numbers(where):
    """Random numbers of a shape, the same in every run."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(where, dtype)

    return draw


@pytest.fixture
def fp8_error():
    """Check fp8 rows against the numbers they stand for.

    Half the distance to the next number is 1/16 of it; the interpreter loses the carry into the
    exponent of one in fifty, which is half of it.
    """

    def check(rows: Fp8Rows, expected: torch.Tensor) -> None:
        error = (rows.dequantised() - expected.float()).abs()
        allowed = expected.abs() / 16 + expected.abs().amax(-1, keepdim=True) * 2**-15
        wrong = (error > allowed).float().mean().item()
        assert wrong <= (0.0 if HAS_GPU else 0.05)
        assert (error <= 8.1 * allowed).all()

    return check
