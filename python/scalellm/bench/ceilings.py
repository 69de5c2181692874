"""This machine's ceilings, measured on the threads that the kernels run on."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scalellm import _core
from scalellm.bench.floor import Ceilings

SECONDS = 0.4  # for each of the three


def measure_ceilings(seconds: float = SECONDS) -> Ceilings:
    """Takes about four times `seconds`. Raises MemoryError without 512 MiB to read."""
    found = _core.cpu_ceilings(seconds)
    return Ceilings(
        read_bytes_s=found["read_bytes_s"],
        int8_ops_s=found["int8_ops_s"] or 0.0,
        bf16_ops_s=found["bf16_ops_s"] or 0.0,
        level=found["level"],
        threads=found["threads"],
    )


def middle(measured: Sequence[Ceilings]) -> Ceilings:
    """The median of each: a shared machine's change from second to second."""

    return Ceilings(
        read_bytes_s=statistics.median(one.read_bytes_s for one in measured),
        int8_ops_s=statistics.median(one.int8_ops_s for one in measured),
        bf16_ops_s=statistics.median(one.bf16_ops_s for one in measured),
        level=measured[0].level,
        threads=measured[0].threads,
    )


def describe(measured: Sequence[Ceilings]) -> str:
    """One line, each ceiling from its lowest to its highest."""

    def each(name: str, digits: int) -> str:
        found = [getattr(one, name) / 1e9 for one in measured]
        if not all(found):
            return "-"
        ends = (min(found), max(found)) if len(found) > 1 else found
        return " to ".join(f"{rate:,.{digits}f}" for rate in ends)

    first = measured[0]
    return (
        f"{first.level}, {first.threads} threads: read {each('read_bytes_s', 1)} GB/s, "
        f"int8 {each('int8_ops_s', 0)} GOP/s, bf16 {each('bf16_ops_s', 0)} GOP/s"
    )


def to_json(ceilings: Ceilings) -> dict[str, Any]:
    return asdict(ceilings)
