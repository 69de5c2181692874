"""Each kernel against what the machine can do: `scalellm bench kernels`.

    roofline = max(bytes read / read bandwidth, operations / peak of their type)
    percent  = roofline / time measured

Bytes are those that must come from memory: weights, keys and values, and the scores that a token is
drawn from. Activations stay in caches, so norms and rotary angles have no ceiling here. Weights and
caches are so many, taken in turn, that none is still in a cache when its turn comes again. Ceilings
are measured beside each op, as a shared machine changes from second to second.

kernels_linear, kernels_attention and kernels_rows time their ops; this puts them together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from scalellm.bench.ceilings import describe, measure_ceilings, to_json
from scalellm.bench.floor import Ceilings, Cost
from scalellm.bench.kernels_attention import time_attention
from scalellm.bench.kernels_linear import time_linears
from scalellm.bench.kernels_rows import time_rows
from scalellm.bench.machine import describe_machine
from scalellm.bench.model_shape import ModelShape, Precision
from scalellm.bench.timing import Timed
from scalellm.errors import ConfigError

SCHEMA = 1
GROUPS = ("linear", "attention", "rows")


@dataclass(frozen=True, slots=True)
class Options:
    """What to time. `groups` are names of GROUPS; `rows` those of linears."""

    shape: ModelShape
    groups: tuple[str, ...] = GROUPS
    precisions: tuple[Precision, ...] = ("bf16", "int8", "int4")
    rows: tuple[int, ...] = (1, 8, 64, 256, 512)
    seconds: float = 0.3  # for each line


@dataclass(frozen=True, slots=True)
class Line:
    """A time, and the ceilings measured beside it."""

    timed: Timed
    ceilings: Ceilings


@dataclass(frozen=True, slots=True)
class KernelResult:
    started: str  # UTC, ISO 8601
    machine: Mapping[str, Any]
    shape: ModelShape
    lines: tuple[Line, ...]
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "machine": dict(self.machine),
            "model": self.shape.name,
            "interrupted": self.interrupted,
            "rows": [line_json(line) for line in self.lines],
        }


def run_kernels(options: Options, say: Callable[[Timed], None]) -> KernelResult:
    """Time all that `options` name; `say` gets each line as it is measured.

    Ctrl-C ends it with what there is. Raises ConfigError for groups that there are not.
    """
    if unknown := [name for name in options.groups if name not in GROUPS]:
        raise ConfigError(f"ops: got {', '.join(unknown)}, allowed: {', '.join(GROUPS)}")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    lines: list[Line] = []
    interrupted = False
    try:
        for timed in _lines(options):
            same_op = lines and lines[-1].timed.op == timed.op
            ceilings = lines[-1].ceilings if same_op else measure_ceilings(options.seconds / 2)
            lines.append(Line(timed, ceilings))
            say(timed)
    except KeyboardInterrupt:
        interrupted = True
    return KernelResult(started, machine, options.shape, tuple(lines), interrupted)


def _lines(options: Options) -> Iterator[Timed]:
    if "linear" in options.groups:
        yield from time_linears(options.shape, options.precisions, options.rows, options.seconds)
    if "attention" in options.groups:
        yield from time_attention(options.shape, options.seconds)
    if "rows" in options.groups:
        yield from time_rows(options.shape, options.seconds)


def bound_by(cost: Cost, ceilings: Ceilings) -> str:
    """Which ceiling binds: "read", or the type that is multiplied."""
    if cost.memory_s(ceilings) >= cost.compute_s(ceilings):
        return "read"
    return "bf16" if cost.precision == "bf16" else "int8"


def share_of_roofline(line: Line) -> float | None:
    """None where nothing that bounds the op was measured."""
    cost = line.timed.cost
    floor_s = 0.0 if cost is None else cost.floor_s(line.ceilings)
    return floor_s / line.timed.seconds if floor_s > 0 else None


def line_json(line: Line) -> dict[str, Any]:
    timed, cost = line.timed, line.timed.cost
    found: dict[str, Any] = {"op": timed.op, "shape": timed.shape, "ms": timed.seconds * 1e3}
    share = share_of_roofline(line)
    if cost is not None:
        found |= {
            "gb_s": cost.read_bytes / timed.seconds / 1e9,
            "gop_s": cost.ops / timed.seconds / 1e9,
            "bound_by": bound_by(cost, line.ceilings),
            "percent": None if share is None else 100 * share,
        }
    return found | {"ceilings": to_json(line.ceilings)}


HEAD = ("op", "shape", "ms", "rate", "bound by", "of roofline")


def cells(line: Line) -> list[str]:
    """The line as text, by the columns of HEAD."""
    timed, cost = line.timed, line.timed.cost
    found = [timed.op, timed.shape, f"{timed.seconds * 1e3:.3f}"]
    if cost is None:
        return [*found, "-", "-", "-"]
    bound = bound_by(cost, line.ceilings)
    if bound == "read":
        rate = f"{cost.read_bytes / timed.seconds / 1e9:.1f} GB/s"
    else:
        rate = f"{cost.ops / timed.seconds / 1e9:,.0f} GOP/s"
    share = share_of_roofline(line)
    return [*found, rate, bound, "-" if share is None else f"{share:.0%}"]


def caption(result: KernelResult) -> str:
    """The ceilings that the table's shares are of."""
    return f"{result.shape.name} shapes; {describe([line.ceilings for line in result.lines])}"
