"""The figures as Markdown, beside what they are to reach."""

from collections.abc import Mapping, Sequence
from typing import Any

# concurrent requests -> TTFT, TBT in ms: Mixtral-8x7B shape in fp8 on one H200, 512 in, 128 out
TARGETS = {1: (25.0, 4.5), 8: (40.0, 12.0), 32: (60.0, 13.5), 64: (99.0, 15.0)}
PUBLISHED = {1: (25.0, 8.5), 32: (29.8, 14.6), 64: (99.4, 16.5)}
LEAST_EXPERTS = 7.5  # of 8 at 64 sequences


def summary(found: Mapping[str, Any]) -> str:
    machine = found.get("machine", {})
    lines = ["# GPU figures", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [f"- {name}: {value:.1f}" for name, value in found.get("ceilings", {}).items()]
    for part, title, write in (
        ("kernels", "Kernels", _kernels),
        ("steps", "Decode steps in the engine", _steps),
        ("experts", "Distinct experts a layer and step", _experts),
        ("mixtral", "Mixtral-8x7B shape, fp8, random weights, 512 in, 128 out", _mixtral),
        ("qwen3", "Qwen3-0.6B shape, bf16, random weights, 128 in, 64 out", _served),
        ("peers", "transformers' continuous batching, bf16, in process, all at once", _peers),
    ):
        lines += ["", f"## {title}", ""]
        given = found.get(part)
        if given is None:
            lines.append("not measured")
        elif isinstance(given, Mapping) and "error" in given:
            lines.append(f"failed: {given['error']}")
        else:
            lines += write(given)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _kernels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        (r["kernel"], r["shape"], f"{r['seconds'] * 1e6:.1f}", f"{r['gb_s']:.0f}",
         f"{r['of_bandwidth']:.0%}")
        for r in rows
    ]  # fmt: skip
    return _table(("kernel", "shape", "us", "GB/s", "of bandwidth"), cells)


def _steps(models: Mapping[str, Any]) -> list[str]:
    cells = []
    for model, result in models.items():
        if "error" in result:
            cells.append((model, "failed", result["error"], "", ""))
            continue
        for r in result["rows"]:
            if "error" in r:
                cells.append((model, r["sequences"], r["error"], "", ""))
                continue
            cells.append(
                (model, r["sequences"], f"{r['step_and_ids_ms']:.2f}",
                 f"{r['step_back_to_back_ms']:.2f}", f"{r['first_step_s']:.2f}")
            )  # fmt: skip
    head = ("model", "sequences", "ms until the ids are there", "ms back to back", "s the first")
    return _table(head, cells)


def _experts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table(("sequences", "experts"), [(r["sequences"], f"{r['experts']:.2f}") for r in rows])


def _latencies(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["level"] != "ok" or not row["completed"]:
        return row["level"], row["level"]
    return f"{row['ttft_ms']['p50']:.1f}", f"{row['tbt_ms']['p50']:.2f}"


def _served(result: Mapping[str, Any]) -> list[str]:
    cells = [(r["concurrency"], *_latencies(r), f"{r['output_tok_s']:.0f}") for r in result["rows"]]
    head = ("concurrent", "TTFT ms", "TBT ms", "tok/s")
    return [f"Ready after {result['ready_after_s']:.1f} s.", "", *_table(head, cells)]


def _mixtral(result: Mapping[str, Any]) -> list[str]:
    cells = []
    for row in result["rows"]:
        count = row["concurrency"]
        goal, published = (
            "{} / {}".format(*pairs[count]) if count in pairs else "-"
            for pairs in (TARGETS, PUBLISHED)
        )
        cells.append((count, *_latencies(row), f"{row['output_tok_s']:.0f}", goal, published))
    head = ("concurrent", "TTFT ms", "TBT ms", "tok/s", "to reach", "published, 8 GPUs")
    return [f"Ready after {result['ready_after_s']:.1f} s.", "", *_table(head, cells)]


def _peers(models: Mapping[str, Any]) -> list[str]:
    cells = []
    for model, result in models.items():
        if "error" in result:
            cells.append((model, "failed", result["error"], "", ""))
            continue
        for r in result["rows"]:
            times = (f"{r[name]:.1f}" if name in r else "-" for name in ("ttft_ms", "tbt_ms"))
            cells.append((model, r["concurrency"], *times, f"{r['output_tok_s']:.0f}"))
    return _table(("model", "concurrent", "TTFT ms", "TBT ms", "tok/s"), cells)
