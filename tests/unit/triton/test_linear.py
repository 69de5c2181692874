"""Matrix products beside torch's: odd sizes, both kinds of scales, everything that is fused."""

import pytest
import torch
import torch.nn.functional as F

from scalellm.kernels.linear.fp8 import Fp8Matrix, quantise_matrix
from scalellm.kernels.quantise import FP8
from scalellm.kernels.quantise.reference import quantise_rows
from scalellm.kernels.quantise.rows import Fp8Rows
from scalellm.kernels.tuning import Tile, default_tile, parse_tiles

SMALL = Tile(16, 32, 64, 4, 2)
SHAPES = [(1, 40, 64), (17, 33, 200), (20, 130, 129)]  # rows, outputs, k


def blocks_of(weight):
    """As a checkpoint with 128 x 128 blocks has it; each block's scale is its own."""
    n, k = weight.shape
    scales = 0.01 + torch.rand(-(-n // 128), -(-k // 128), device=weight.device)
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    return Fp8Matrix((weight / wide).clamp(-448, 448).to(FP8), scales)


def grouped(x):
    """Rows with a scale for each 128 numbers."""
    rows, k = x.shape
    scales = 0.5 + torch.rand(rows, -(-k // 128), device=x.device)
    return Fp8Rows((x / scales.repeat_interleave(128, 1)[:, :k]).to(FP8), scales)


def run(x, weight, bias=None, gated=False, dtype=torch.float32):
    from scalellm.kernels.linear import triton

    n = (weight.data if isinstance(weight, Fp8Matrix) else weight).shape[0] // (2 if gated else 1)
    rows = x.data if isinstance(x, Fp8Rows) else x
    out = torch.full((len(rows), n), torch.nan, dtype=dtype, device=rows.device)
    return triton.linear(x, weight, bias, out=out, gated=gated, tile=SMALL)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-3 * expected.abs().max().item(), rtol=2e-3)


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain(rows, n, k, dtype, numbers):
    x, weight = numbers(rows, 2 * k, dtype=dtype)[:, :k], numbers(n, k, dtype=dtype)
    close(run(x, weight), F.linear(x.float(), weight.float()))


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
@pytest.mark.parametrize("rows_of", [quantise_rows, grouped], ids=["per token", "per 128"])
@pytest.mark.parametrize("matrix_of", [quantise_matrix, blocks_of], ids=["per channel", "blocks"])
def test_fp8(rows, n, k, rows_of, matrix_of, numbers):
    x, weight = rows_of(numbers(rows, k)), matrix_of(numbers(n, k))
    close(run(x, weight), F.linear(x.dequantised(), weight.dequantised(torch.float32)))


@pytest.mark.parametrize("rows", [1, 18])
def test_bias(rows, numbers):
    x, weight, bias = numbers(rows, 70), numbers(45, 70), numbers(45)
    close(run(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("matrix_of", [lambda w: w, quantise_matrix, blocks_of])
@pytest.mark.parametrize("biased", [False, True])
def test_gated(matrix_of, biased, numbers):
    """Halves of 128, where blocks of scales do not straddle gate and up, as in checkpoints."""
    x, weight = numbers(5, 140), matrix_of(numbers(256, 140))
    bias = numbers(256) if biased else None
    rows, wide = x, weight
    if isinstance(weight, Fp8Matrix):
        x = quantise_rows(x)
        rows, wide = x.dequantised(), weight.dequantised(torch.float32)
    gate, up = F.linear(rows, wide, bias).chunk(2, -1)
    close(run(x, weight, bias, gated=True), F.silu(gate) * up)


def test_gated_to_fp8(numbers, fp8_error):
    """200 outputs: a group of 128 and one of 72."""
    from scalellm.kernels.linear import triton

    x, weight = quantise_rows(numbers(3, 60)), quantise_matrix(numbers(400, 60))
    gate, up = F.linear(x.dequantised(), weight.dequantised(torch.float32)).chunk(2, -1)
    expected = F.silu(gate) * up
    found = triton.linear_silu_and_mul_fp8(x, weight)
    assert found.scales.shape == (3, 2)
    torch.testing.assert_close(
        found.scales[:, 1], expected[:, 128:].abs().amax(-1) / 448, atol=1e-6, rtol=1e-3
    )
    fp8_error(found, expected)


def test_no_rows_are_no_work(numbers):
    assert run(numbers(0, 32), numbers(8, 32)).shape == (0, 8)


def test_measured_tiles_win_up_to_their_rows():
    found = parse_tiles(
        """
        [[tile]]
        kernel = "linear fp8"
        n = 64
        k = 32
        rows = 16
        tile = [16, 32, 128]
        warps = 4
        stages = 5
        """
    )
    assert found == {("linear fp8", 64, 32): [(16, Tile(16, 32, 128, 4, 5))]}


def test_few_rows_have_narrow_tiles_and_all_multiprocessors():
    assert default_tile("linear bf16", 1, 1024).outputs == 16
    assert default_tile("linear fp8", 1, 28672).outputs == 128
    assert default_tile("linear fp8", 512, 4096) == Tile(128, 128, 128, 8, 3)
