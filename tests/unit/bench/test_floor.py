"""The least time of a step, by hand."""

import pytest

from scalellm.bench.ceilings import describe, middle
from scalellm.bench.floor import Ceilings, decode_ms, matrix_cost, prefill_ms, run_floor
from scalellm.bench.model_shape import QWEN3_0_6B, MatrixShape, ModelShape

READ, INT8, BF16 = 30e9, 1e12, 0.4e12
MACHINE = Ceilings(READ, INT8, BF16)
MIXTURE = ModelShape(
    "mixture", 2, 64, 4, 2, 16, 128, 1000,
    experts=8, experts_per_token=2, expert_intermediate=128, sparse_layers=2,
)  # fmt: skip


def test_the_known_shape_has_the_numbers_of_its_checkpoint() -> None:
    # Qwen3-0.6B: 440.4 M numbers in matrices of 28 layers, 155.6 M in the output layer.
    assert QWEN3_0_6B.weight_bytes("bf16") / 2 == pytest.approx(596.0e6, rel=1e-3)
    assert QWEN3_0_6B.weight_bytes("int8") == pytest.approx(596.0e6, rel=5e-3)
    assert QWEN3_0_6B.weight_bytes("int4") == pytest.approx(596.0e6 * 9 / 16, rel=1e-3)
    assert QWEN3_0_6B.kv_bytes_per_token() == 112 * 1024
    assert QWEN3_0_6B.kv_bytes_per_token("int8") == 28 * 2 * 8 * (128 + 4)


def test_one_sequence_is_bound_by_reading_weights_and_its_context() -> None:
    read = QWEN3_0_6B.weight_bytes("int8") + 160 * QWEN3_0_6B.kv_bytes_per_token()
    found = decode_ms(QWEN3_0_6B, MACHINE, "int8", batch=1, context=160)
    assert found == pytest.approx(1e3 * read / READ)


def test_many_sequences_are_bound_by_products_and_by_reading_keys_and_values() -> None:
    products_s = 2 * 64 * 596.0e6 / INT8
    kv_s = 64 * 160 * 112 * 1024 / READ
    found = decode_ms(QWEN3_0_6B, MACHINE, "int8", batch=64, context=160)
    assert found == pytest.approx(1e3 * (products_s + kv_s), rel=2e-3)
    assert decode_ms(QWEN3_0_6B, MACHINE, "int8", 64, 160, kv="int8") < found


def test_a_prompt_computes_its_output_layer_once() -> None:
    layers_s = 2 * 128 * 440.4e6 / INT8
    output_s = QWEN3_0_6B.output.weight_bytes("int8") / READ
    attention_s = 4 * 28 * 16 * 128 * (128 * 129 / 2) / BF16
    found = prefill_ms(QWEN3_0_6B, MACHINE, "int8", prompt_tokens=128)
    assert found == pytest.approx(1e3 * (layers_s + output_s + attention_s), rel=2e-3)


def test_bf16_weights_are_multiplied_at_the_peak_of_bf16() -> None:
    matrix = MatrixShape("m", 1024, 1024, 1)
    cost = matrix_cost(matrix, 512, "bf16")
    assert cost.compute_s(MACHINE) == pytest.approx(2 * 512 * 1024 * 1024 / BF16)
    assert cost.floor_s(MACHINE) == cost.compute_s(MACHINE) > cost.memory_s(MACHINE)


def test_a_peak_that_is_not_known_bounds_nothing() -> None:
    cost = matrix_cost(MatrixShape("m", 1024, 1024, 1), 512, "int8")
    assert cost.floor_s(Ceilings(READ, 0.0, 0.0)) == cost.memory_s(MACHINE)


def test_experts_are_read_if_hit_and_computed_if_chosen() -> None:
    matrix = MatrixShape("expert", 256, 64, 2, experts=8, experts_per_token=2)
    assert matrix.experts_hit(1) == pytest.approx(2)
    assert matrix.experts_hit(10_000) == pytest.approx(8)
    assert 2 < matrix.experts_hit(2) < 4
    cost = matrix_cost(matrix, 3, "int8")
    assert cost.ops == 2 * 3 * 2 * 256 * 64
    names = [one.name for one in MIXTURE.matrices]
    assert names == ["qkv", "o", "expert gate_up", "expert down"]
    dense = MIXTURE.weight_bytes("bf16") - MIXTURE.output.weight_bytes("bf16")
    attention = 2 * 2 * (128 * 64 + 64 * 64)
    assert dense == attention + 2 * 8 * 2 * (256 * 64 + 64 * 128)


def test_a_run_is_its_prompts_and_all_but_one_token_of_its_answers() -> None:
    prompts_ms = prefill_ms(QWEN3_0_6B, MACHINE, "int8", 128, batch=64)
    mean_ms = decode_ms(QWEN3_0_6B, MACHINE, "int8", 64, 128 + 32)
    found = run_floor(QWEN3_0_6B, MACHINE, "int8", 64, 128, 64)
    assert found.tbt_ms == pytest.approx(mean_ms, rel=1e-3)
    assert found.output_tok_s == pytest.approx(64 * 64e3 / (prompts_ms + 63 * mean_ms), rel=1e-3)
    assert found.ttft_ms == prefill_ms(QWEN3_0_6B, MACHINE, "int8", 128, batch=32)
    alone = run_floor(QWEN3_0_6B, MACHINE, "int8", 1, 128, 1)
    assert (alone.tbt_ms, alone.ttft_ms) == (
        0.0,
        prefill_ms(QWEN3_0_6B, MACHINE, "int8", 128),
    )


def test_ceilings_are_medians_and_each_is_told_with_its_spread() -> None:
    measured = [Ceilings(read * 1e9, 9e11, 0.0, "avx2", 2) for read in (25, 20, 24)]
    assert middle(measured) == Ceilings(24e9, 9e11, 0.0, "avx2", 2)
    assert describe(measured[:2]) == (
        "avx2, 2 threads: read 20.0 to 25.0 GB/s, int8 900 to 900 GOP/s, bf16 - GOP/s"
    )
    assert "read 25.0 GB/s, int8 900 GOP/s" in describe(measured[:1])
