"""One self-contained HTML page of a result: figures, tables, and what they were measured on."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scalellm.bench.plots import draw, svg
from scalellm.bench.results import Result, Row
from scalellm.bench.table import milliseconds, notes, row_label

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
.facts td { text-align: left; vertical-align: top } svg { max-width: 100%; height: auto }
.bad { color: #c23b22 } pre { white-space: pre-wrap }
"""
_LATENCIES = (
    ("TTFT", "ttft_ms"),
    ("TBT", "tbt_ms"),
    ("ITL", "itl_ms"),
    ("max gap", "max_gap_ms"),
    ("E2E", "e2e_ms"),
)


def write_report(result: Result, path: Path) -> None:
    path.write_text(report(result), encoding="utf-8")


def report(result: Result) -> str:
    """The page; nothing in it is fetched from anywhere."""
    title = f"{result.target['model']} at {result.target['url']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(result.started)}{', interrupted' if result.interrupted else ''}</p>",
        svg(draw(result)),
        "<h2>Levels</h2>",
        "<p>milliseconds: p50 / p90 / p99</p>",
        _levels(result.rows),
        "<h2>Notes</h2>",
        "<ul>" + "".join(f"<li>{escape(line.plain)}</li>" for line in notes(result)) + "</ul>",
    ]
    for heading, facts in (
        ("Target", result.target),
        ("Workload", result.workload),
        ("Machine", result.machine),
    ):
        parts += [f"<h2>{heading}</h2>", _facts(facts)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _levels(rows: Sequence[Row]) -> str:
    names = ["load", "completed", "failed", "timed out", *(name for name, _ in _LATENCIES)]
    names += ["tok/s", "requests/s"]
    with_slo = any("slo" in row for row in rows)
    if with_slo:
        names += ["met objectives", "goodput/s"]
    lines = []
    for row in rows:
        cells = [row_label(row), row["completed"], row["failed"]]
        cells.append(f"{row['timed_out']}{' timeout' if row['level'] == 'timeout' else ''}")
        cells += [_percentiles(row[field]) for _, field in _LATENCIES]
        cells += [f"{row['output_tok_s']:.1f}", f"{row['request_s']:.2f}"]
        if with_slo:
            cells.append(f"{row['slo']['share']:.1%}")
            cells.append(f"{row['slo']['goodput_request_s']:.2f}")
        lines.append((bool(row["failed"] or row["timed_out"]), cells))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(_line(bad, cells) for bad, cells in lines)}</table>"


def _line(bad: bool, cells: Iterable[Any]) -> str:
    mark = ' class="bad"' if bad else ""
    return f"<tr{mark}>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"


def _percentiles(summary: Mapping[str, float | None]) -> str:
    return " / ".join(milliseconds(summary[name]) for name in ("p50", "p90", "p99"))


def _facts(facts: Mapping[str, Any]) -> str:
    lines = (
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value not in (None, [], {})
    )
    return f'<table class="facts">{"".join(lines)}</table>'
