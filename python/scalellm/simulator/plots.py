"""Draws a simulation: requests at once, waits and shapes over time, one panel a plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalellm.bench.plots import check_plots, svg
from scalellm.simulator.cluster import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plots", "write_plot"]
_BINS = 120


def write_plot(names: Sequence[str], runs: Sequence[Run], path: Path) -> None:
    """PATH.svg or PATH.png, by its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)
    for name, run, (axes,) in zip(names, runs, panels, strict=True):
        _panel(axes, name, run)
    if path.suffix == ".svg":
        path.write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=150)


def _panel(axes: "Axes", name: str, run: Run) -> None:
    axes.set_title(name)
    served = [one for one in run.served if not one.failed]
    if not served:
        return
    edges = np.linspace(0.0, max(one.end_ms for one in served), _BINS + 1)
    starts = np.searchsorted(np.sort([one.send.at_ms for one in served]), edges)
    ends = np.searchsorted(np.sort([one.end_ms for one in served]), edges)
    seconds = edges / 1e3
    axes.step(seconds, starts - ends, where="post", label="requests at once", color="#2f6db5")
    axes.set_ylabel("requests")
    waits = axes.twinx()
    at = np.array([one.send.at_ms for one in served]) / 1e3
    ttft = np.array([one.ttft_ms for one in served])
    # Dots as one image: a day has tens of thousands.
    waits.plot(at, ttft, ".", markersize=2, alpha=0.4, color="#c23b22", rasterized=True)
    waits.set_yscale("log")
    waits.set_ylabel("TTFT ms")
    for switch in run.switches:
        axes.axvline(switch.at_ms / 1e3, color="#444444", linewidth=1)
        label = str(switch.blueprint)
        place = (switch.at_ms / 1e3, 0.98)
        axes.annotate(label, place, xycoords=("data", "axes fraction"), fontsize=8, va="top")
    axes.set_xlabel("s")
