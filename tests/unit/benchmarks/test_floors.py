"""Samples beside floors, and targets."""

from pathlib import Path
from typing import Any

import pytest
from floors import FLOOR as OVER_FLOOR
from floors import Target, floor_tables, precision_of, targets_of
from peers.measure import Sample
from peers.record import Record
from peers.system import Launch, System

from scalellm.bench.floor import Ceilings, run_floor
from scalellm.bench.model_shape import QWEN3_0_6B
from scalellm.bench.table import milliseconds

CEILINGS = Ceilings(30e9, 1e12, 0.4e12, "avx512", 2)
TARGETS = targets_of("AMD EPYC")
FLOOR = run_floor(QWEN3_0_6B, CEILINGS, "int8", 64, 128, 64, "int8")


def system(name: str, precision: str = "int8") -> System:
    return System(name, name.upper(), precision, lambda *_: None, lambda *_: Launch(()))


def sample(name: str, level: int, repeat: int = 0, **fields: Any) -> Sample:
    figures = {"requests": 8, "completed": 8, "ttft_ms": 100.0, "tbt_ms": 10.0}
    return Sample(name, level, repeat, **{**figures, **fields})


def record(*samples: Sample) -> Record:
    machine = {"cpu": "a processor", "cores_usable": 2}
    return Record(Path("systems.json"), "python bench", "2026-01-01", machine, samples)


def rows(text: str, first: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("named", "meant"),
    [("int8", "int8"), ("Q8_0", "int8"), ("W8A8", "int8"), ("Q4_0", "int4"), ("bf16", "bf16")],
)
def test_the_floor_is_that_of_a_systems_own_weights(named: str, meant: str) -> None:
    assert precision_of(system("a", named)) == meant


def test_a_row_has_medians_beside_their_floor_and_the_ceilings_stand_above() -> None:
    rate = FLOOR.output_tok_s
    samples = [sample("a", 64, repeat, output_tok_s=rate * share) for repeat, share in
               enumerate((0.4, 0.5, 0.9))]  # fmt: skip
    text = floor_tables(record(*samples), [system("a")], [CEILINGS], [])
    (row,) = rows(text, "A")
    assert row[1:4] == ["int8", "64", "100"]
    assert row[6] == milliseconds(FLOOR.tbt_ms)
    assert row[-1] == "50%"
    assert "read 30.0 GB/s, int8 1,000 GOP/s, bf16 400 GOP/s" in text
    assert "python bench" in text


def test_targets_are_judged_by_ratios_where_both_sides_were_measured() -> None:
    samples = [
        sample("scalellm-int8", 64, output_tok_s=FLOOR.output_tok_s * 0.9, tbt_ms=30.0),
        sample("openvino-best", 64, output_tok_s=FLOOR.output_tok_s * 0.6, tbt_ms=40.0),
        sample("vllm", 64, completed=0, error="no wheel"),
    ]
    systems = [system(name) for name in ("scalellm-int8", "openvino-best", "vllm")]
    text = floor_tables(record(*samples), systems, [CEILINGS], TARGETS)
    found = {row[0]: row[1:] for row in rows(text, "tok/s") + rows(text, "TBT")}
    assert found == {
        "tok/s at 64, scalellm-int8 / floor": [">= 0.85", "0.90", "met"],
        "tok/s at 64, scalellm-int8 / openvino-best": [">= 1.6", "1.50", "missed"],
        "TBT at 64, scalellm-int8 / openvino-best": ["<= 0.5", "0.75", "missed"],
    }


def test_every_target_names_a_measure_that_there_is() -> None:
    for target in TARGETS:
        one = [sample(name, target.level) for name in (target.system, target.other) if name]
        floor_tables(record(*one), [system(target.system)], [CEILINGS], [target])
    unknown = Target("joy", 1, "scalellm-int8", OVER_FLOOR, 1.0)
    with pytest.raises(KeyError):
        floor_tables(
            record(sample("scalellm-int8", 1)), [system("scalellm-int8")], [CEILINGS], [unknown]
        )


def test_one_request_is_judged_by_reading_the_weights_alone() -> None:
    weights_ms = 1e3 * QWEN3_0_6B.weight_bytes("int8") / 30e9
    found = record(sample("scalellm-int8", 1, tbt_ms=1.1 * weights_ms))
    text = floor_tables(found, [system("scalellm-int8")], [CEILINGS], TARGETS)
    assert "TBT at 1, scalellm-int8 / weights read | <= 1.15 | 1.10 | met" in text


def test_more_is_asked_of_intels_processors() -> None:
    assert TARGETS[1].bound == 1.6
    assert targets_of("Intel(R) Xeon(R)")[1].bound == 2.0
