"""Samples beside floors as Markdown, and what ScaleLLM is to reach."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peers.measure import Load, Sample
from peers.record import Record
from peers.system import System

from scalellm.bench.ceilings import describe, middle
from scalellm.bench.floor import Ceilings, RunFloor, run_floor
from scalellm.bench.model_shape import QWEN3_0_6B, Precision
from scalellm.bench.table import NOT_MEASURED, milliseconds

_FORMULA = """\
Floor: each matrix of a step takes max(bytes / read bandwidth, 2 rows n k / peak), attention
max(KV bytes / read bandwidth, 4 pairs heads head_dim / bf16 peak), one after the other; a run is
its prompts and all but one token of its answers; int8 and int4 weights are multiplied as int8 and
have int8 KV, others bf16; everything else costs nothing (scalellm/bench/floor.py).
"""
FLOOR, WEIGHTS = "floor", "weights read"
Number = Callable[[Sample], float | None]


@dataclass(frozen=True, slots=True)
class Target:
    """`measure` ("tok/s", "TBT" or "TTFT") of `system` at a level over that of `other`.

    `other` is another system, FLOOR, or WEIGHTS: weight bytes / read bandwidth. With `least` the
    ratio must not be below `bound`, else not above it.
    """

    measure: str
    level: int
    system: str
    other: str
    bound: float
    least: bool = False


def targets_of(cpu: str) -> tuple[Target, ...]:
    """Those of a processor of this name: int8 products are faster on Intel's."""
    over_openvino = 2.0 if "intel" in cpu.lower() else 1.6
    return (
        Target("tok/s", 64, "scalellm-int8", FLOOR, 0.85, least=True),
        Target("tok/s", 64, "scalellm-int8", "openvino-best", over_openvino, least=True),
        Target("tok/s", 64, "scalellm-int8", "vllm-w8a8", 7.0, least=True),
        Target("tok/s", 64, "scalellm-int8", "vllm", 12.0, least=True),
        Target("TBT", 64, "scalellm-int8", "openvino-best", 0.5),
        Target("TBT", 8, "scalellm-int8", "openvino-best", 0.5),
        Target("TBT", 1, "scalellm-int8", WEIGHTS, 1.15),
        Target("TBT", 1, "scalellm-int8", "openvino-best", 1.0),
        Target("TBT", 1, "scalellm-int4", "llama.cpp-q4_0", 0.8),
        Target("TTFT", 1, "scalellm-int8", "openvino-best", 0.6),
    )


_NUMBERS: dict[str, Number] = {
    "tok/s": lambda sample: sample.output_tok_s,
    "TBT": lambda sample: sample.tbt_ms,
    "TTFT": lambda sample: sample.ttft_ms,
}


def precision_of(system: System) -> Precision:
    """What a system's name for its weights amounts to."""
    name = system.precision.lower()
    if name.startswith(("int4", "q4")):
        return "int4"
    return "int8" if name.startswith(("int8", "q8", "w8")) else "bf16"


def floor_tables(
    record: Record,
    systems: Sequence[System],
    ceilings: Sequence[Ceilings],
    targets: Sequence[Target],
) -> str:
    """A row for each system and level, with its floor; then the targets that can be judged."""
    found = middle(ceilings)
    machine = record.machine
    about = (
        f"Ceilings, measured {len(ceilings)} times between the repeats on "
        f"{machine['cores_usable']} cores of {machine['cpu']}: {describe(ceilings)}. {_FORMULA}"
    )
    lines = [
        about,
        f"Medians (and lowest to highest), begun {record.started}, with\n\n    {record.command}\n",
        "| system | weights | open | TTFT ms | floor | TBT ms | floor | tok/s | floor | share |",
        "|---|---|" + "---:|" * 8,
        *(
            _row(record, system, level, found)
            for system in systems
            for level in _levels(record, system.name)
        ),
    ]
    return "\n".join(lines) + "\n" + _target_table(record, systems, found, targets)


def _row(record: Record, system: System, level: int, ceilings: Ceilings) -> str:
    floor = _floor(system, level, ceilings)
    ttft, tbt, rate = (
        _median(record, system.name, level, name) for name in ("TTFT", "TBT", "tok/s")
    )
    share = NOT_MEASURED if rate is None else f"{rate / floor.output_tok_s:.0%}"
    cells = [
        system.about,
        system.precision,
        str(level),
        milliseconds(ttft),
        milliseconds(floor.ttft_ms),
        milliseconds(tbt),
        milliseconds(floor.tbt_ms),
        _with_spread(_found(record, system.name, level, "tok/s")),
        milliseconds(floor.output_tok_s),
        share,
    ]
    return f"| {' | '.join(cells)} |"


def _target_table(
    record: Record, systems: Sequence[System], ceilings: Ceilings, targets: Sequence[Target]
) -> str:
    by_name = {system.name: system for system in systems}
    lines = []
    for target in targets:
        ratio = _ratio(record, by_name, ceilings, target)
        if ratio is not None:
            met = ratio >= target.bound if target.least else ratio <= target.bound
            sign = ">=" if target.least else "<="
            lines.append(
                f"| {target.measure} at {target.level}, {target.system} / "
                f"{target.other} | {sign} {target.bound:g} | {ratio:.2f} | "
                f"{'met' if met else 'missed'} |"
            )
    if not lines:
        return ""
    return "\n".join(["", "| ratio | target | measured | |", "|---|---:|---:|---|", *lines]) + "\n"


def _ratio(
    record: Record, systems: dict[str, System], ceilings: Ceilings, target: Target
) -> float | None:
    """None where a part of it was not measured."""
    ours = _median(record, target.system, target.level, target.measure)
    if target.other not in (FLOOR, WEIGHTS):
        other = _median(record, target.other, target.level, target.measure)
    elif target.system not in systems:
        other = None
    elif target.other == WEIGHTS:
        weight_bytes = QWEN3_0_6B.weight_bytes(precision_of(systems[target.system]))
        other = 1e3 * weight_bytes / ceilings.read_bytes_s
    else:
        floor = _floor(systems[target.system], target.level, ceilings)
        by_measure = {"tok/s": floor.output_tok_s, "TBT": floor.tbt_ms, "TTFT": floor.ttft_ms}
        other = by_measure[target.measure]
    return ours / other if ours and other else None


def _floor(system: System, level: int, ceilings: Ceilings) -> RunFloor:
    load, weights = Load(0.0), precision_of(system)
    kv: Precision = "bf16" if weights == "bf16" else "int8"
    return run_floor(
        QWEN3_0_6B, ceilings, weights, level, load.input_tokens, load.output_tokens, kv
    )


def _levels(record: Record, name: str) -> list[int]:
    return sorted(
        {one.concurrency for one in record.samples if one.system == name and one.completed}
    )


def _median(record: Record, name: str, level: int, measure: str) -> float | None:
    found = _found(record, name, level, measure)
    return statistics.median(found) if found else None


def _found(record: Record, name: str, level: int, measure: str) -> list[float]:
    """One number for each repeat."""
    number = _NUMBERS[measure]
    return [
        value
        for one in record.samples
        if (one.system, one.concurrency) == (name, level)
        and one.completed
        and (value := number(one)) is not None
    ]


def _with_spread(found: Sequence[float]) -> str:
    """The median, and the lowest and highest of several."""
    if len(found) < 2:
        return milliseconds(found[0] if found else None)
    middle, low, high = (milliseconds(f(found)) for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"
