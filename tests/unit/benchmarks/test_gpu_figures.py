"""What is written about a GPU: tiles that the kernels can read back, and a summary of any part."""

import sys

import pytest
import torch
from gpu_figures import PARTS
from make_shape import SHAPES
from on_gpu import prefill
from on_gpu.parts import LEAST_S, run_parts
from on_gpu.summary import summary
from on_gpu.tiles import Best, Problem, best_tile, candidates, problems, toml

from scalellm.kernels.attention import Heads
from scalellm.kernels.tuning import Tile, default_tile, parse_prefills, parse_tiles


def test_the_matrices_of_models():
    assert problems(SHAPES["mixtral-8x7b"], "fp8") == [
        Problem("linear fp8", 6144, 4096),
        Problem("linear fp8", 4096, 4096),
        Problem("experts fp8", 28672, 4096, True, 8, 2),
        Problem("experts fp8", 4096, 14336, False, 8, 2),
        Problem("linear bf16", 32000, 4096),
    ]
    assert Problem("linear bf16", 1024, 2048) in problems(SHAPES["qwen3-0.6b"], "bf16")


def test_the_fastest_tile_that_fits_is_taken():
    problem = Problem("linear fp8", 4096, 4096)
    wanted = Tile(16, 64, 256, 4, 5)
    assert wanted in set(candidates(10))

    def run(tile):
        if tile.k == 64:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if tile == wanted else 2.0

    best = best_tile(problem, 10, run)
    assert (best.tile, best.seconds, best.default_s) == (wanted, 1.0, 2.0)


def test_the_default_tile_stays_where_nothing_is_faster():
    problem = Problem("experts fp8", 4096, 14336, False, 8, 2)
    best = best_tile(problem, 1, lambda _tile: 1.0)
    assert best.tile == default_tile("experts fp8", 1, 2 * 4096)


def test_the_file_is_read_back():
    tile = Tile(16, 64, 128, 4, 4)
    best = Best(Problem("linear bf16", 8, 4), 16, tile, 1e-6, 2e-6)
    assert parse_tiles(toml("A GPU", [best])) == {("linear bf16", 8, 4): [(16, tile)]}


@pytest.mark.parametrize(
    ("flashinfer_us", "by"),
    [((50.0, 90.0), "flashinfer"), ((50.0, None), "triton"), ((99.0, 99.0), "triton")],
)
def test_whose_prompts_attention_was_faster_is_read_back(flashinfer_us, by):
    """By enough, in every case, or else it is Triton's."""
    heads = Heads(32, 8, 128, 4096, None)
    found = [prefill.Timed((1, 512, 0), 100.0, us) for us in flashinfer_us]
    text = prefill.toml(heads, torch.float8_e4m3fn, found, "1.2.3")
    assert parse_prefills(text) == {(32, 8, 128, "float8_e4m3fn", True): by}
    assert parse_tiles(text) == {}


def row(concurrency, level="ok"):
    latency = {"p50": 12.345, "p99": 20.0}
    return {
        "concurrency": concurrency, "level": level, "completed": 8, "output_tok_s": 99.9,
        "ttft_ms": latency, "tbt_ms": latency,
    }  # fmt: skip


def test_parts_that_are_missing_or_failed_say_so():
    text = summary({"kernels": {"error": "RuntimeError: no"}})
    assert "failed: RuntimeError: no" in text
    assert text.count("not measured") == len(PARTS) - 1


def test_rows_before_a_failure_are_shown():
    text = summary({"mixtral": {"ready_after_s": 9.0, "rows": [row(1)], "error": "timeout"}})
    assert "failed: timeout" in text
    assert "| 1 | 12.3 | 12.35 |" in text


def test_a_row_of_collapsed_routing_does_not_count():
    rows = [{"sequences": 64, "experts": 7.1}, {"sequences": 8, "experts": 5.0}]
    text = summary({"experts": rows})
    assert "| 64 | 7.10: random weights have collapsed" in text
    assert "| 8 | 5.00 |" in text


def test_every_part_is_written():
    text = summary(
        {
            "machine": {"gpus": ["NVIDIA H200"]},
            "ceilings": {"read_gb_s": 4300.0},
            "check": {"passed": False, "result": "1 failed", "wrong": ["FAILED a"]},
            "kernels": [
                {
                    "kernel": "k", "shape": "1 x 2", "seconds": 1e-5, "gb_s": 4000,
                    "of_bandwidth": 0.93,
                }
            ],
            "prefill": [
                {
                    "heads": "m, bfloat16", "shape": "1 x 512 after 0",
                    "seconds": {"triton": 1e-5, "flashinfer": None},
                    "tflop_s": {"triton": 210.0, "flashinfer": None},
                }
            ],
            "shapes": {
                "gpus": 2, "ready_after_s": 9.0, "phases": ["steady: 1 x TP 2"],
                "switches_s": [3.21, 4.0], "completed": 128, "failed": 0, "max_gap_ms": 812.0,
                "output_tok_s": 900.0,
            },
            "steps": {
                "a": {"error": "x"},
                "b": {
                    "rows": [
                        {"sequences": 1, "error": "small"},
                        {
                            "sequences": 8, "step_and_ids_ms": 2.0, "step_back_to_back_ms": 1.9,
                            "first_step_s": 0.5,
                        },
                    ]
                },
            },
            "experts": [{"sequences": 64, "experts": 7.96}],
            "mixtral": {"ready_after_s": 18.0, "rows": [row(1), row(64, "timeout")]},
            "qwen3": {"ready_after_s": 4.0, "rows": [row(1)]},
            "ready": {"mixtral-8x7b": 12.0},
            "ranks": {"2 GPUs": {"ready_after_s": 4.0, "rows": [row(1)]}},
            "peers": {
                "m": {"rows": [{"concurrency": 1, "output_tok_s": 50.0}]},
                "n": {"error": "y"},
            },
        }
    )  # fmt: skip
    assert "| k | 1 x 2 | 10.0 | 4000 | 93% |" in text
    assert "| 1 | 12.3 | 12.35 | 100 | 25.0 / 4.5 | 25.0 / 8.5 |" in text
    assert "| 64 | timeout | timeout | 100 | 99.0 / 15.0 | 99.4 / 16.5 |" in text
    assert "| b | 8 | 2.00 | 1.90 | 0.10 | 0.50 |" in text
    assert "| mixtral-8x7b | 12.0 | 20 |" in text
    assert "| m, bfloat16 | 1 x 512 after 0 | 10.0 (210) | - |" in text
    assert "| 128 | 0 | 812 | 900 | 3.2, 4.0 |" in text
    assert "FAILED a" in text
    assert "not measured" not in text


# ------------------------------------------------------------ parts, each within a time of its own


def run(scripts, seconds=30.0, left_s=lambda: 1e9):
    found = {}
    run_parts(
        dict.fromkeys(scripts, seconds),
        lambda part, _seconds: [sys.executable, "-c", scripts[part]],
        left_s,
        found.__setitem__,
    )
    return found


def test_a_part_that_dies_ends_no_other():
    found = run(
        {
            "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "failed": "raise SystemExit(3)",
            "fine": "",
        }
    )
    assert found == {
        "killed": "ended by SIGKILL", "failed": "ended with exit status 3", "fine": None
    }  # fmt: skip


def test_no_part_is_begun_when_the_minutes_are_over():
    found = run({"a": "raise SystemExit(3)"}, left_s=lambda: LEAST_S - 1)
    assert found == {"a": "not begun, the minutes are over"}


def test_a_part_is_told_when_its_time_is_over():
    """In a process of its own, as the timer is the process's."""
    script = """
import time
from on_gpu.parts import OutOfTimeError, within
try:
    within(0.05, lambda: time.sleep(60))
except OutOfTimeError:
    raise SystemExit(7)
"""
    found = run({"slow": f"import sys; sys.path[:0] = {sys.path!r}\n{script}"})
    assert found == {"slow": "ended with exit status 7"}
