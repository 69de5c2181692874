"""What is written about a GPU: tiles that the kernels can read back, and a summary of any part."""

from make_shape import SHAPES
from on_gpu.summary import summary
from on_gpu.tiles import Best, Problem, best_tile, candidates, problems, toml

from scalellm.kernels.tuning import Tile, default_tile, parse_tiles


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


def row(concurrency, level="ok"):
    latency = {"p50": 12.345, "p99": 20.0}
    return {
        "concurrency": concurrency, "level": level, "completed": 8, "output_tok_s": 99.9,
        "ttft_ms": latency, "tbt_ms": latency,
    }  # fmt: skip


def test_parts_that_are_missing_or_failed_say_so():
    text = summary({"kernels": {"error": "RuntimeError: no"}})
    assert "failed: RuntimeError: no" in text
    assert text.count("not measured") == 5


def test_every_part_is_written():
    text = summary(
        {
            "machine": {"gpus": ["NVIDIA H200"]},
            "ceilings": {"read_gb_s": 4300.0},
            "kernels": [
                {
                    "kernel": "k", "shape": "1 x 2", "seconds": 1e-5, "gb_s": 4000,
                    "of_bandwidth": 0.93,
                }
            ],
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
            "peers": {
                "m": {"rows": [{"concurrency": 1, "output_tok_s": 50.0}]},
                "n": {"error": "y"},
            },
        }
    )  # fmt: skip
    assert "| k | 1 x 2 | 10.0 | 4000 | 93% |" in text
    assert "| 1 | 12.3 | 12.35 | 100 | 25.0 / 4.5 | 25.0 / 8.5 |" in text
    assert "| 64 | timeout | timeout | 100 | 99.0 / 15.0 | 99.4 / 16.5 |" in text
    assert "| b | 8 | 2.00 | 1.90 | 0.50 |" in text
    assert "| 64 | 7.96 |" in text
    assert "not measured" not in text
