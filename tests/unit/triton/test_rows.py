"""Kernels over rows: RMSNorm with what is fused into it, and quantising."""

import pytest
import torch

from scalellm.kernels.quantise import reference as quantise_reference
from scalellm.kernels.rms_norm import reference

SIZES = [(1, 8), (3, 100), (5, 257)]


@pytest.mark.parametrize(("rows", "d"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rms_norm(rows, d, dtype, numbers):
    from scalellm.kernels.rms_norm import triton

    x, weight = numbers(rows, 2 * d, dtype=dtype)[:, :d], numbers(d, dtype=dtype)
    torch.testing.assert_close(
        triton.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_the_sum_is_kept_and_normalised(rows, d, numbers):
    from scalellm.kernels.rms_norm import triton

    x, delta, weight = numbers(rows, d), numbers(rows, 2 * d)[:, d:], numbers(d)
    total, out = triton.add_rms_norm(x, delta, weight, 1e-5)
    torch.testing.assert_close(total, x + delta)
    torch.testing.assert_close(out, reference.rms_norm(x + delta, weight, 1e-5))


@pytest.mark.parametrize(("rows", "d"), SIZES)
@pytest.mark.parametrize("added", [False, True])
def test_the_norm_in_fp8(rows, d, added, numbers, fp8_error):
    from scalellm.kernels.rms_norm import triton

    x, weight = numbers(rows, d), numbers(d)
    delta = numbers(rows, d) if added else None
    if delta is None:
        fp8 = triton.rms_norm(x, weight, 1e-5, fp8=True)
    else:
        total, fp8 = triton.add_rms_norm(x, delta, weight, 1e-5, fp8=True)
        x = x + delta
        torch.testing.assert_close(total, x)
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(fp8.plain, expected)
    torch.testing.assert_close(fp8.scales, expected.abs().amax(-1, keepdim=True) / 448)
    fp8_error(fp8, expected)


@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_rows_in_fp8(rows, k, numbers, fp8_error):
    from scalellm.kernels.quantise import triton

    x = numbers(rows, k)
    x[0] = 0
    found, expected = triton.quantise_rows(x), quantise_reference.quantise_rows(x)
    torch.testing.assert_close(found.scales, expected.scales)
    fp8_error(found, x)


def test_the_reference_is_within_half_a_step(numbers):
    x = numbers(4, 300) * 100
    error = (quantise_reference.quantise_rows(x).dequantised() - x).abs()
    assert (error <= x.abs() / 16 + x.abs().amax() * 2**-16).all()
