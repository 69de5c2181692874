"""Throughput over concurrency, one line a system."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from peers.record import Record
from peers.system import System

_OURS = "scalellm"
_INCHES = (8.0, 4.5)


def plot_throughput(record: Record, systems: Sequence[System], path: Path) -> None:
    """Write medians over repeats, with lowest and highest, in the format that `path` ends in."""
    import matplotlib

    matplotlib.use("agg")
    # The same record gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "scalellm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=_INCHES, layout="constrained")
    levels: set[int] = set()
    for system in systems:
        points = throughput(record, system.name)
        if not points:
            continue
        levels |= points.keys()
        middles = [statistics.median(rates) for rates in points.values()]
        pairs = zip(points.values(), middles, strict=True)
        below, above = zip(*((mid - min(r), max(r) - mid) for r, mid in pairs), strict=True)
        axes.errorbar(
            list(points),
            middles,
            yerr=(below, above),
            label=f"{system.about}, {system.precision}",
            linewidth=2.5 if system.name.startswith(_OURS) else 1.0,
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(levels), [str(level) for level in sorted(levels)])
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("output tokens a second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def throughput(record: Record, name: str) -> dict[int, list[float]]:
    """Output tokens a second of each repeat, by concurrency, where anything completed."""
    points: dict[int, list[float]] = {}
    for sample in sorted(record.samples, key=lambda sample: sample.concurrency):
        if sample.system == name and sample.completed:
            points.setdefault(sample.concurrency, []).append(sample.output_tok_s)
    return points
