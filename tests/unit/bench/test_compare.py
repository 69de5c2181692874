from dataclasses import replace

import numpy as np
import pytest

from scalellm.bench.compare import compare, remarks
from scalellm.bench.results import Result, read_result
from scalellm.cli.main import main
from scalellm.errors import ConfigError

COLUMNS = [
    "outcome", "prompt", "start_ms", "ttft_ms", "tbt_ms", "e2e_ms", "output_tokens",
]  # fmt: skip


def row(seed: int, ttft_ms: float, number: int = 100, concurrency: int = 4, **fields):
    """Requests whose TTFT is lognormal around `ttft_ms` with a deviation of a fifth."""
    random = np.random.default_rng(seed)
    waits = ttft_ms * np.exp(random.normal(0.0, 0.2, number))
    rows = [
        ["completed", at, 10.0 * at, wait, 10.0, wait + 630.0, 64] for at, wait in enumerate(waits)
    ]

    def summary(column: int):
        values = [request[column] for request in rows]
        return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}

    total_s = sum(request[5] for request in rows) / 1e3
    return {
        "concurrency": concurrency, "rate": None, "arrivals": None, "completed": number,
        "failed": 0, "timed_out": 0, "output_tok_s": 64 * number * 4 / total_s,
        "ttft_ms": summary(3), "tbt_ms": summary(4), "e2e_ms": summary(5),
        "generator": {"bottleneck": False}, "records": {"columns": COLUMNS, "rows": rows}, **fields,
    }  # fmt: skip


def result(*rows) -> Result:
    workload = {"endpoint": "chat", "input_tokens": 128}
    return Result({"url": "u", "model": "m"}, {"cpu": "c"}, workload, rows, False, "2026")


def figure(differences, metric: str):
    (found,) = [difference for difference in differences if difference.metric == metric]
    return found


def test_the_same_server_twice_is_noise() -> None:
    differences = compare(result(row(1, 100.0)), result(row(2, 100.0)))
    assert {difference.verdict for difference in differences} == {"noise"}
    found = figure(differences, "ttft_ms p50")
    assert found.low < 1 < found.high
    assert found.low < found.ratio < found.high
    assert found.by == "requests"


def test_a_difference_beyond_the_spread_has_a_direction() -> None:
    slower = compare(result(row(1, 100.0)), result(row(2, 150.0)))
    assert figure(slower, "ttft_ms p50").verdict == "worse"
    assert figure(slower, "ttft_ms p50").ratio == pytest.approx(1.5, rel=0.1)
    assert figure(slower, "output_tok_s").verdict == "worse", "less is worse there"
    assert figure(slower, "tbt_ms p50").verdict == "noise"
    faster = compare(result(row(2, 150.0)), result(row(1, 100.0)))
    assert figure(faster, "output_tok_s").verdict == "better"


def test_a_clear_but_tiny_difference_is_noise_below_the_floor() -> None:
    a, b = result(row(1, 1.0, 5000)), result(row(1, 1.015, 5000))
    assert figure(compare(a, b, floor=0.05), "ttft_ms p50").verdict == "noise"


def test_few_requests_are_not_judged_and_have_no_p99() -> None:
    differences = compare(result(row(1, 100.0, 5)), result(row(2, 900.0, 5)))
    assert {difference.verdict for difference in differences} == {"unknown"}
    assert not any("p99" in difference.metric for difference in differences)
    many = compare(result(row(1, 100.0, 300)), result(row(2, 100.0, 300)))
    assert figure(many, "ttft_ms p99").verdict == "noise"


def test_repeated_levels_are_judged_by_the_spread_between_runs() -> None:
    # Each run is tight, but the runs lie far apart: what one run shows is not what the next will.
    shaky = result(*(row(seed, mean) for seed, mean in enumerate((80.0, 100.0, 120.0, 140.0))))
    found = figure(compare(result(*(row(9, 100.0),) * 3), shaky), "ttft_ms p50")
    assert (found.by, found.verdict) == ("runs", "noise")
    assert figure(compare(result(row(9, 100.0)), result(row(3, 140.0))), "ttft_ms p50").verdict == (
        "worse"
    )


def test_an_open_loops_throughput_is_the_loads_and_not_judged() -> None:
    a, b = (result(row(seed, 100.0, rate=5.0, concurrency=None)) for seed in (1, 2))
    assert figure(compare(a, b), "output_tok_s").verdict == "unknown"
    assert figure(compare(a, b), "ttft_ms p50").level == "5/s None"


def test_what_makes_results_hard_to_compare_is_said() -> None:
    a = result(row(1, 100.0), row(1, 100.0, concurrency=8))
    b = replace(result(row(2, 100.0, failed=3)), interrupted=True, workload={"endpoint": "chat"})
    text = "\n".join(remarks(a, b))
    for part in ("input_tokens: 128 and None", "levels of one only: 8", "B was interrupted",
                 "B: 3 requests failed"):  # fmt: skip
        assert part in text
    assert remarks(a, a) == []


def test_the_command_prints_ratios_and_can_fail(tmp_path, capsys) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    result(row(1, 100.0)).write(tmp_path / "a.json")
    result(row(2, 150.0)).write(tmp_path / "b.json")
    assert main(["bench", "compare", *paths]) == 0
    assert "worse" in capsys.readouterr().out
    assert main(["bench", "compare", *paths, "--fail-if-worse"]) == 1
    assert main(["bench", "compare", *paths[::-1], "--fail-if-worse"]) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_what_is_no_result_is_refused(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_result(path)
