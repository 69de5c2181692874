"""From the bench's rows to the cells of the published tables."""

from pathlib import Path
from typing import Any

import pytest
from peers.measure import Costs, Load, Sample, sample_of
from peers.plot import plot_throughput, throughput
from peers.record import Record
from peers.system import Launch, System
from peers.tables import system_tables

LOAD = Load(timeout_s=300.0)
COSTS = Costs(cpu_s=3.0, pss_bytes=1 << 30, ready_after_s=2.0)
MACHINE = {"cpu": "a CPU", "cores_usable": 2, "cpu_flags": ["avx2"], "memory_bytes": 8 << 30}


def row(*e2e_ms: float, timed_out: int = 0, failures: dict[str, Any] | None = None) -> Any:
    """A row of the bench with these completed requests."""
    latency = {"mean": 1.0, "p50": 100.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    records = [["completed", time] for time in e2e_ms] + [["timed_out", 1.0]] * timed_out
    return {
        "concurrency": 8,
        "completed": len(e2e_ms),
        "failed": sum(failure["count"] for failure in (failures or {}).values()),
        "timed_out": timed_out,
        "failures": failures or {},
        "ttft_ms": latency,
        "tbt_ms": latency,
        "output_tok_s": 10.0,
        "output_tokens": 64 * len(e2e_ms),
        "input_tokens": 128 * len(e2e_ms),
        "records": {"columns": ["outcome", "e2e_ms"], "rows": records},
    }


def sample(name: str, level: int, repeat: int = 0, **fields: Any) -> Sample:
    figures = {"requests": 8, "completed": 8, "ttft_ms": 100.0, "tbt_ms": 10.0}
    return Sample(name, level, repeat, **{**figures, **fields})


def system(name: str) -> System:
    return System(name, name.upper(), "int8", lambda *_: None, lambda *_: Launch(()))


def record(*samples: Sample) -> Record:
    return Record(Path("systems.json"), "python bench", "2026-01-01", MACHINE, samples)


def test_requests_over_a_minute_are_late_though_they_completed() -> None:
    found = sample_of(row(59_000.0, 61_000.0, timed_out=1), COSTS, LOAD, "a", 0)
    assert (found.requests, found.completed, found.late) == (3, 2, 2)
    assert found.timed_out


def test_a_tenth_late_is_not_a_timeout() -> None:
    assert not sample_of(row(*[1000.0] * 9, 61_000.0), COSTS, LOAD, "a", 0).timed_out
    assert sample_of(row(*[1000.0] * 8, 61_000.0, 61_000.0), COSTS, LOAD, "a", 0).timed_out


def test_processor_time_is_shared_by_measured_and_warm_up_tokens() -> None:
    found = sample_of(row(1.0, 1.0, 1.0, 1.0), COSTS, LOAD, "a", 0)
    assert found.cpu_s_per_1000_tokens == pytest.approx(1000 * 3.0 / (6 * 64))


def test_a_level_without_an_answer_tells_the_first_failure() -> None:
    failures = {"status": {"count": 4, "example": "HTTP 422 ignore_eos"}}
    found = sample_of(row(failures=failures), COSTS, LOAD, "a", 0)
    assert found.error == "4 failed by status, e.g. HTTP 422 ignore_eos"


def test_the_command_asks_for_as_many_requests_as_clients_and_at_least_four() -> None:
    def asked(load: Load, concurrency: int) -> str:
        command = load.command("http://h:1", None, concurrency, 0, Path("x.json"))
        return command[command.index("--requests") + 1]

    assert (asked(LOAD, 1), asked(LOAD, 64)) == ("4", "64")
    assert asked(Load(60.0, rounds=20, fewest_requests=100), 16) == "320"
    other = Load(60.0, ignore_eos=False).command("http://h:1", "a model", 1, 0, Path("x.json"))
    assert "--no-ignore-eos" in other
    assert other[other.index("--model") + 1] == "a model"


def cells(text: str, first: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_cells_are_medians_over_repeats_with_their_spread() -> None:
    samples = [
        sample("a", 1, repeat, ttft_ms=ttft, output_tok_s=ttft / 10)
        for repeat, ttft in enumerate((300.0, 100.0, 200.0))
    ]
    latency, throughput, _ = cells(system_tables(record(*samples), [system("a")]), "A")
    assert latency == ["A", "int8", "200 / 10.0"]
    assert throughput == ["A", "int8", "20.0 (10.0 to 30.0)"]


def test_a_level_is_timeout_when_half_of_its_repeats_are() -> None:
    samples = [sample("a", 1), sample("a", 8, 0, late=8), sample("a", 8, 1)]
    latency, throughput, _ = cells(system_tables(record(*samples), [system("a")]), "A")
    assert latency[2:] == ["100 / 10.0", "timeout"]
    assert throughput[3].startswith("0.0 (")


def test_a_level_that_was_not_run_is_timeout_without_figures() -> None:
    samples = [sample("a", 1, pss_bytes=1 << 30), Sample("a", 8, 0, skipped_after=1)]
    latency, throughput, costs = cells(system_tables(record(*samples), [system("a")]), "A")
    assert (latency[3], throughput[3], costs[3]) == ("timeout", "-", "-")
    assert costs[4] == "1.00"


def test_a_system_without_figures_is_named_with_its_reason() -> None:
    failed = Sample("b", 1, 0, error="no wheel\nfor this machine")
    text = system_tables(record(sample("a", 1), failed), [system("a"), system("b"), system("c")])
    assert cells(text, "B") == cells(text, "C") == []
    assert "- Not measured: B (`b`): no wheel for this machine" in text


def test_the_plot_has_every_level_that_completed_and_is_the_same_each_time(tmp_path: Path) -> None:
    samples = [
        sample("a", 8, 0, output_tok_s=30.0),
        sample("a", 1, 0, output_tok_s=10.0),
        sample("a", 1, 1, output_tok_s=12.0),
        Sample("a", 64, 0, skipped_after=8),
        Sample("b", 1, 0, error="no wheel"),
    ]
    found = record(*samples)
    assert throughput(found, "a") == {1: [10.0, 12.0], 8: [30.0]}
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        plot_throughput(found, [system("a"), system("b")], path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
