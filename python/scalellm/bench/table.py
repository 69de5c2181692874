"""Rows as tables: for the terminal, and as Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scalellm.bench.results import Result, Row

NOT_MEASURED = "-"
_WIDE = 110


def row_label(row: Row) -> str:
    return str(row["concurrency"]) if row["rate"] is None else f"{row['rate']:g}/s"


def milliseconds(value: float | None) -> str:
    """Three digits that count; a dash for what was not measured."""
    if value is None:
        return NOT_MEASURED
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def _pair(summary: Row) -> str:
    return f"{milliseconds(summary['p50'])} / {milliseconds(summary['p99'])}"


def row_line(row: Row) -> str:
    """A row as one line."""
    return (
        f"{row_label(row)}: {row['completed']} done, {row['failed']} failed, "
        f"{row['timed_out']} late; TTFT {_pair(row['ttft_ms'])} ms, TBT {_pair(row['tbt_ms'])} ms, "
        f"{row['output_tok_s']:.1f} tok/s{_held(row)}"
    )


def _held(row: Row) -> str:
    return f"; {row['slo']['share']:.0%} met the objectives" if "slo" in row else ""


def _slo_cell(row: Row) -> str:
    return f"{row['slo']['share']:.0%}{'' if row['slo']['held'] else ' missed'}"


def result_table(rows: Sequence[Row], wide: bool = True) -> Table:
    """One line a level, p50 / p99 of each latency; narrow terminals get fewer columns."""
    table = Table(title="milliseconds: p50 / p99", title_justify="left", title_style="dim")
    first = "req/s" if rows and all(row["rate"] is not None for row in rows) else "open"
    for name in (first, "done", "failed", "late", "TTFT", "TBT", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    with_slo = any("slo" in row for row in rows)
    # Beside the objectives there is no room for all latencies.
    more = (
        {"E2E": "e2e_ms"}
        if with_slo
        else {"ITL": "itl_ms", "E2E": "e2e_ms", "max gap": "max_gap_ms"}
    )
    names = [*more, "done/s"] if wide else []
    for name in [*names, "SLO met", "goodput/s"] if with_slo else names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells: list[str | Text] = [
            row_label(row),
            str(row["completed"]),
            Text(str(row["failed"]), style="red" if row["failed"] else ""),
            Text(_timed_out(row), style="red" if row["timed_out"] else ""),
            _pair(row["ttft_ms"]),
            _pair(row["tbt_ms"]),
            f"{row['output_tok_s']:.1f}",
        ]
        if wide:
            cells += [_pair(row[field]) for field in more.values()]
            cells.append(f"{row['request_s']:.2f}")
        if with_slo:
            held = row["slo"]["held"]
            cells.append(Text(_slo_cell(row), style="green" if held else "red"))
            cells.append(f"{row['slo']['goodput_request_s']:.2f}")
        table.add_row(*cells)
    return table


def _timed_out(row: Row) -> str:
    mark = " timeout" if row["level"] == "timeout" else ""
    return f"{row['timed_out']}{mark}"


def notes(result: Result) -> list[Text]:
    """What a reader must know beside the figures: failures, lengths, the generator's own lag."""
    lines = []
    for row in result.rows:
        where = f"{row_label(row)}: "
        for kind, failure in row["failures"].items():
            example = " ".join(str(failure["example"]).split())[:160]
            text = f"{where}{failure['count']} failed by {kind}, e.g. {example}"
            lines.append(Text(text, style="red"))
        if row.get("resent"):
            text = f"{where}{row['resent']} sent again: the server had ended a kept connection"
            lines.append(Text(text, style="yellow"))
        generator = row["generator"]
        if generator["bottleneck"]:
            text = f"{where}the load generator was the bottleneck: {generator['bottleneck_reason']}"
            lines.append(Text(text, style="yellow"))
        lines += [Text(where + text, style="yellow") for text in _length_notes(row)]
    if result.find_max is not None:
        lines.append(_found_note(result.find_max))
    prompts = result.workload["prompts"]
    if prompts["method"] == "words":
        text = "the target tells no token counts beforehand: prompt lengths are approximate"
        lines.append(Text(text, style="yellow"))
    if prompts["lengthened"]:
        text = f"{prompts['lengthened']} prompts were made as long as the chat template asks for"
        lines.append(Text(text, style="yellow"))
    if result.rows:
        lines.append(Text(_lag_note(result.rows), style="dim"))
    return lines


def _found_note(found: Row) -> Text:
    held, missed = found["rate"], found["missed_rate"]
    if held is None:
        text = "no rate held the objectives"
        return Text(text + ("" if missed is None else f"; {missed:g}/s missed"), style="red")
    text = f"highest rate that held the objectives: {held:g}/s"
    if missed is None:
        return Text(text + "; the search ended before one missed", style="yellow")
    return Text(f"{text}; {missed:g}/s missed", style="green" if found["found"] else "yellow")


def _length_notes(row: Row) -> list[str]:
    found: list[str] = []
    completed = row["completed"]
    if completed == 0:
        return found
    for what, field in (("prompts", "input_tokens"), ("answers", "output_tokens")):
        asked, total = row.get(f"asked_{field}"), row[field]
        if None not in (asked, total) and total != asked:
            text = f"{what} were {total / completed:.1f} tokens, asked for {asked / completed:.1f}"
            found.append(text)
    if "chunks" in row["token_sources"]:
        found.append("the server tells no token counts: one chunk was counted as one token")
    if row.get("prompts_sent", 0) > row.get("prompts", 0):
        found.append("prompts were sent more than once; a prefix cache makes this level faster")
    return found


def _lag_note(rows: Sequence[Row]) -> str:
    def worst(which: str, what: str) -> str:
        found = [row["generator"]["lag"][which][what] for row in rows]
        return milliseconds(max((value for value in found if value is not None), default=None))

    return (
        f"load generator: sends late by {worst('send_ms', 'p99')} ms (p99), "
        f"{worst('send_ms', 'max')} at most; reads by {worst('read_ms', 'p99')} (p99), "
        f"{worst('read_ms', 'max')} at most"
    )


def print_result(result: Result, console: Console) -> None:
    console.print(result_table(result.rows, wide=console.width >= _WIDE))
    for line in notes(result):
        console.print(line, soft_wrap=True)


def markdown_table(rows: Sequence[Row]) -> str:
    """The published form: TTFT and TBT by level, `timeout` where it applies."""
    lines = [
        "| concurrent requests | TTFT ms (p50 / p99) | TBT ms (p50 / p99) | tok/s | timed out |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ok = row["level"] == "ok" and row["completed"] > 0
        state = "timeout" if row["level"] == "timeout" else "failed"
        latencies: list[Any] = [_pair(row["ttft_ms"]), _pair(row["tbt_ms"])]
        cells = latencies if ok else [state, state]
        of_all = row["completed"] + row["failed"] + row["timed_out"]
        cells += [f"{row['output_tok_s']:.1f}", f"{row['timed_out']} of {of_all}"]
        lines.append(f"| {row_label(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
