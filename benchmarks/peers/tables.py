"""Records as Markdown: the published form, throughput, what it costs, and what is missing."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from peers.measure import LATE_AFTER_S, Sample
from peers.record import Record
from peers.system import System
from peers.weights import MIXTRAL, QWEN3
from scalellm.bench.table import NOT_MEASURED, milliseconds

_GIB = 1 << 30
_REASON_CHARACTERS = 300
_SHAPES = {
    QWEN3: "Qwen3-0.6B shape",
    MIXTRAL: "Mixtral shape of 0.9 B parameters, 0.3 B active (8 experts, 2 for each token)",
}
_SYSTEMS_LOAD = (
    "the same random weights for all; 128 tokens in, 64 out, greedy, end of "
    "sequence ignored, a level's requests all at once, load generator on the same machine."
)
_LATENCY_CAPTION = (
    "TTFT / TBT in ms by concurrent requests, of the median request; `timeout`: over a tenth of "
    f"the requests took longer than {LATE_AFTER_S:.0f} s."
)
_COST_CAPTION = (
    "What it costs: processor seconds of all of a system's processes for 1,000 output tokens, "
    "prompts and warm-up included, at the lowest and the highest level; memory (PSS, largest "
    "seen); seconds from start to ready, with caches of an earlier start."
)
Number = Callable[[Sample], float | None]


def system_tables(record: Record, systems: Sequence[System], shape: str = QWEN3) -> str:
    """Servers that were measured at all, in the order given; medians over repeats."""
    rows = [(system.name, f"{system.about} | {system.precision}") for system in systems]
    rows = [row for row in rows if _samples(record, row[0])]
    levels = _levels(record, (name for name, _ in rows))
    ends = [levels[0], levels[-1]] if len(levels) > 1 else levels
    texts = [
        f"{_SHAPES[shape]}, {_SYSTEMS_LOAD} {_about(record)}\n",
        f"{_LATENCY_CAPTION}\n",
        _table("system | weights", rows, levels, lambda name, at: _latencies(record, name, at)),
        "Output tokens a second (lowest to highest of the repeats); late requests count.\n",
        _table("system | weights", rows, levels, lambda name, at: _throughput(record, name, at)),
        f"{_COST_CAPTION}\n",
        _costs(record, rows, ends),
    ]
    return "\n".join(texts) + _not_measured(record, systems)


def _about(record: Record) -> str:
    machine = record.machine
    repeats = 1 + max((sample.repeat for sample in record.samples), default=0)
    return (
        f"Medians of up to {repeats} repeats, in which the systems take turns. Begun "
        f"{record.started} on {machine['cores_usable']} cores of {machine['cpu']} "
        f"({' '.join(machine['cpu_flags'])}), {machine['memory_bytes'] / _GIB:.0f} GiB, with"
        f"\n\n    {record.command}"
    )


def _table(
    first: str,
    rows: Sequence[tuple[str, str]],
    levels: Sequence[int],
    cell: Callable[[str, int], str],
) -> str:
    """`rows`: the system's name, and its first cells."""
    numbers = "".join(f" {level} |" for level in levels)
    columns = first.count("|") + 1
    lines = [f"| {first} |{numbers}", "|" + "---|" * columns + "---:|" * len(levels)]
    for name, text in rows:
        lines.append(f"| {text} |" + "".join(f" {cell(name, level)} |" for level in levels))
    return "\n".join(lines) + "\n"


def _samples(record: Record, name: str, level: int | None = None) -> list[Sample]:
    """Those with figures, or at a level that was pointless to run."""
    return [
        sample
        for sample in record.samples
        if sample.system == name and not sample.error and level in (None, sample.concurrency)
    ]


def _levels(record: Record, names: Iterable[str]) -> list[int]:
    return sorted({sample.concurrency for name in names for sample in _samples(record, name)})


def _median(samples: Sequence[Sample], number: Number) -> float | None:
    found = [value for sample in samples if (value := number(sample)) is not None]
    return statistics.median(found) if found else None


def _figure(samples: Sequence[Sample], number: Number) -> str:
    """Three digits that count."""
    return milliseconds(_median(samples, number))


def _latencies(record: Record, name: str, level: int) -> str:
    samples = _samples(record, name, level)
    if samples and 2 * sum(sample.timed_out for sample in samples) >= len(samples):
        return "timeout"
    ttft, tbt = (
        _figure(samples, lambda sample: sample.ttft_ms),
        _figure(samples, lambda sample: sample.tbt_ms),
    )
    return f"{ttft} / {tbt}" if samples else NOT_MEASURED


def _throughput(record: Record, name: str, level: int) -> str:
    samples = _run(_samples(record, name, level))
    if not samples:
        return NOT_MEASURED
    rates = [sample.output_tok_s for sample in samples]
    spread = f" ({min(rates):.1f} to {max(rates):.1f})" if len(rates) > 1 else ""
    return f"{statistics.median(rates):.1f}{spread}"


def _run(samples: Iterable[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.skipped_after is None]


def _costs(record: Record, rows: Sequence[tuple[str, str]], ends: Sequence[int]) -> str:
    heads = [*(f"CPU-s at {level}" for level in ends), "PSS GiB", "ready after s"]
    lines = [f"| system | weights | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for name, text in rows:
        run = _run(_samples(record, name))
        cells = [
            _figure(_samples(record, name, end), lambda sample: sample.cpu_s_per_1000_tokens)
            for end in ends
        ]
        cells.append(milliseconds(max((sample.pss_bytes / _GIB for sample in run), default=None)))
        cells.append(_figure(run, lambda sample: sample.ready_after_s))
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _not_measured(record: Record, wanted: Sequence[System]) -> str:
    """A line for each system without any figure, with the reason."""
    lines = []
    for system in wanted:
        errors = [s.error for s in record.samples if s.system == system.name and s.error]
        if errors and not _samples(record, system.name):
            reason = " ".join(errors[-1].split())[:_REASON_CHARACTERS]
            lines.append(f"- Not measured: {system.about} (`{system.name}`): {reason}")
    return "\n" + "\n".join(lines) + "\n" if lines else ""
