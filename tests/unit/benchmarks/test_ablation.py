"""The ablation's table: what each part adds to an engine of set speed."""

from ablation import SYSTEMS, TBT_MS, TTFT_MS, table
from peers.measure import Sample


def sample(system: str, concurrency: int, ttft_ms: float | None, tbt_ms: float | None) -> Sample:
    return Sample(system, concurrency, 0, ttft_ms=ttft_ms, tbt_ms=tbt_ms, output_tok_s=100.0)


def test_neighbours_stand_together_with_what_they_add() -> None:
    samples = [
        sample("gateway", 8, TTFT_MS + 1.0, TBT_MS),
        sample("fastapi-http", 8, TTFT_MS + 9.0, TBT_MS + 2.0),
        sample("loop-ids", 1, TBT_MS + 1.5, TBT_MS + 0.5),
    ]
    rows = table(samples, set_times=True).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["loop-ids", "fastapi-http", "gateway"]
    assert "+1.50, +0.50" in rows[0]
    assert "+9.00, +2.00" in rows[1]
    assert "+1.00, +0.00" in rows[2]


def test_every_system_has_a_place_and_what_failed_a_dash() -> None:
    rows = table([sample(name, 1, None, None) for name in SYSTEMS], set_times=True).splitlines()
    assert len(rows) == 2 + len(SYSTEMS) and all(" - | - | - | " in row for row in rows[2:])
    assert "added" not in table([], set_times=False)
