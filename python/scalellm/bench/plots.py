"""Draws a result: latency over load, throughput over latency, and each request's life.

matplotlib is an optional dependency (`pip install scalellm[plot]`).
"""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalellm.bench.records import Records
from scalellm.bench.results import Result, Row
from scalellm.bench.table import row_label
from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A timeline of more requests is a black square.
_TIMELINE_REQUESTS = 200
_WAITING, _STREAMING, _FAILED = "#c0c7d0", "#2f6db5", "#c23b22"


def check_plots() -> None:
    """Raise ConfigError now, rather than after an hour of measuring, if nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "plot, html: need matplotlib, which is not installed: pip install 'scalellm[plot]'"
        )


def write_plots(result: Result, path: Path) -> tuple[Path, Path]:
    """Write PATH.png and PATH.svg (a suffix of either is left out); returns both paths."""
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    paths = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    figure = draw(result)
    figure.savefig(paths[0], dpi=150)
    paths[1].write_text(svg(figure), encoding="utf-8")
    return paths


def svg(figure: "Figure") -> str:
    """The figure as SVG text: letters stay letters, and nothing in it tells the time."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scalellm"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw(result: Result) -> "Figure":
    """Four panels; a panel without data says so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    title = f"{result.target['model']} at {result.target['url']}"
    figure.suptitle(f"{title}, {result.started}", fontsize=10)
    rows = [row for row in result.rows if row["completed"]]
    _latency(axes[0][0], rows, "ttft_ms", "time to first token")
    _latency(axes[0][1], rows, "tbt_ms", "time between tokens")
    _throughput(axes[1][0], rows)
    _timeline(axes[1][1], rows)
    return figure


def _latency(axes: "Axes", rows: Sequence[Row], metric: str, title: str) -> None:
    axes.set_title(title)
    drawn = False
    for field, marker in (("concurrency", "o"), ("rate", "s")):
        found = [row for row in rows if row[field] is not None and row[metric]["p50"] is not None]
        found.sort(key=lambda row: float(row[field]))
        for name, style in (("p50", "-"), ("p99", "--")) if found else ():
            label = name if field == "concurrency" else f"{name}, open loop"
            x = [row[field] for row in found]
            y = [row[metric][name] for row in found]
            axes.plot(x, y, style, marker=marker, label=label)
            drawn = True
    if not drawn:
        _say_nothing(axes)
        return
    fields = {field for row in rows for field in ("concurrency", "rate") if row[field] is not None}
    names = {"concurrency": "concurrent requests", "rate": "requests a second"}
    axes.set_xlabel(" or ".join(names[field] for field in sorted(fields)))
    axes.set_ylabel("ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _throughput(axes: "Axes", rows: Sequence[Row]) -> None:
    axes.set_title("throughput over latency")
    found = [row for row in rows if row["e2e_ms"]["p50"] is not None]
    if not found:
        _say_nothing(axes)
        return
    x = [row["e2e_ms"]["p50"] / 1e3 for row in found]
    y = [row["output_tok_s"] for row in found]
    axes.plot(x, y, "o-")
    for row, at in zip(found, zip(x, y, strict=True), strict=True):
        axes.annotate(row_label(row), at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel("end to end, p50, s")
    axes.set_ylabel("output tokens a second")
    axes.grid(alpha=0.3)


def _timeline(axes: "Axes", rows: Sequence[Row]) -> None:
    """Each request of the row with the most at once: waiting, then streaming."""
    if not rows:
        axes.set_title("requests")
        _say_nothing(axes)
        return
    row = max(rows, key=lambda row: row["concurrency"] or row["rate"])
    requests = Records.of(row).by_start()
    axes.set_title(f"requests at {row_label(row)}: waiting, streaming")
    for at, request in enumerate(requests[:_TIMELINE_REQUESTS]):
        for begin_s, length_s, colour in _bars(request):
            axes.barh(at, length_s, left=begin_s, height=0.9, color=colour)
    axes.invert_yaxis()
    axes.set_xlabel("s")
    rest = len(requests) - _TIMELINE_REQUESTS
    axes.set_ylabel("request" + (f" (the first {_TIMELINE_REQUESTS})" if rest > 0 else ""))


def _bars(request: Any) -> list[tuple[float, float, str]]:
    begin_s, e2e_s = request["start_ms"] / 1e3, request["e2e_ms"] / 1e3
    if request["outcome"] != "completed":
        return [(begin_s, e2e_s, _FAILED)]
    wait_s = e2e_s if request["ttft_ms"] is None else request["ttft_ms"] / 1e3
    stream = (begin_s + wait_s, e2e_s - wait_s, _STREAMING)
    return [(begin_s, wait_s, _WAITING), stream]


def _say_nothing(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
