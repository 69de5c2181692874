"""Tensors arrive whole, through buffers that are smaller than they."""

import pytest
import torch

from scalellm.loader.staging import Staging

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 64), (0, 4), (10, 10, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_number_arrives_in_its_place(shape, dtype):
    staging = Staging(CPU, piece_bytes=100)
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for wanted in (dtype, torch.bfloat16):
        out = torch.full(shape, torch.nan, dtype=wanted)
        staging.copy(out, stored)
        assert torch.equal(out, stored.to(wanted))


def test_a_tensor_that_is_not_contiguous():
    stored = torch.arange(24.0).view(4, 6).t()
    out = torch.empty(6, 4)
    Staging(CPU, piece_bytes=32).copy(out, stored)
    assert torch.equal(out, stored)
