"""Each kernel against what the machine can do: `scalellm bench kernels`.

    roofline = max(bytes read / read bandwidth, operations / peak of their type)
    percent  = roofline / time measured

Bytes are those that must come from memory: weights, keys and values, and the scores that a token is
drawn from. Activations stay in caches, so norms and rotary angles have no ceiling here. Weights and
caches are so many, taken in turn, that none is still in a cache when its turn comes again.

kernels_linear, kernels_attention and kernels_rows time their ops; this puts them together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from scalellm.bench.ceilings import describe, highest, measure_ceilings, to_json
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
class KernelResult:
    """`measured`: the ceilings before and after, whose highest the lines are compared with."""

    started: str  # UTC, ISO 8601
    machine: Mapping[str, Any]
    shape: ModelShape
    measured: tuple[Ceilings, ...]
    lines: tuple[Timed, ...]
    interrupted: bool = False

    @property
    def ceilings(self) -> Ceilings:
        return highest(self.measured)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "machine": dict(self.machine),
            "model": self.shape.name,
            "ceilings": [to_json(one) for one in self.measured],
            "interrupted": self.interrupted,
            "rows": [line_json(line, self.ceilings) for line in self.lines],
        }


def run_kernels(options: Options, say: Callable[[Timed], None]) -> KernelResult:
    """Time all that `options` name; `say` gets each line as it is measured.

    Ctrl-C ends it with what there is. Raises ConfigError for groups that there are not.
    """
    if unknown := [name for name in options.groups if name not in GROUPS]:
        raise ConfigError(f"ops: got {', '.join(unknown)}, allowed: {', '.join(GROUPS)}")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    before = measure_ceilings()
    lines: list[Timed] = []
    interrupted = False
    try:
        for line in _lines(options):
            lines.append(line)
            say(line)
    except KeyboardInterrupt:
        interrupted = True
    measured = (before, before if interrupted else measure_ceilings())
    return KernelResult(started, machine, options.shape, measured, tuple(lines), interrupted)


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


def share_of_roofline(line: Timed, ceilings: Ceilings) -> float | None:
    """None where nothing that bounds the op was measured."""
    floor_s = 0.0 if line.cost is None else line.cost.floor_s(ceilings)
    return floor_s / line.seconds if floor_s > 0 else None


def line_json(line: Timed, ceilings: Ceilings) -> dict[str, Any]:
    found: dict[str, Any] = {"op": line.op, "shape": line.shape, "ms": line.seconds * 1e3}
    if line.cost is not None:
        found |= {
            "gb_s": line.cost.read_bytes / line.seconds / 1e9,
            "gop_s": line.cost.ops / line.seconds / 1e9,
            "bound_by": bound_by(line.cost, ceilings),
            "percent": 100 * (share_of_roofline(line, ceilings) or 0.0),
        }
    return found


def cells(line: Timed, ceilings: Ceilings) -> list[str]:
    """The line as text: op, shape, ms, rate, ceiling, percent of the roofline."""
    found = [line.op, line.shape, f"{line.seconds * 1e3:.3f}"]
    if line.cost is None:
        return [*found, "-", "-", "-"]
    bound = bound_by(line.cost, ceilings)
    if bound == "read":
        rate = f"{line.cost.read_bytes / line.seconds / 1e9:.1f} GB/s"
    else:
        rate = f"{line.cost.ops / line.seconds / 1e9:,.0f} GOP/s"
    share = share_of_roofline(line, ceilings)
    return [*found, rate, bound, "-" if share is None else f"{share:.0%}"]


HEAD = ("op", "shape", "ms", "rate", "bound by", "of roofline")


def table_lines(result: KernelResult) -> Sequence[Sequence[str]]:
    return [HEAD, *(cells(line, result.ceilings) for line in result.lines)]


def caption(result: KernelResult) -> str:
    """The ceilings that the table's shares are of."""
    return f"{result.shape.name} shapes; {describe(result.measured)}"
