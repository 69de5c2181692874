"""The figures as Markdown, beside what they are to reach."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# concurrent requests -> TTFT, TBT in ms: Mixtral-8x7B shape in fp8 on one H200, 512 in, 128 out
TARGETS = {1: (25.0, 4.5), 8: (40.0, 12.0), 32: (60.0, 13.5), 64: (99.0, 15.0)}
PUBLISHED = {1: (25.0, 8.5), 32: (29.8, 14.6), 64: (99.4, 16.5)}
LEAST_EXPERTS, COLLAPSE_AT = 7.5, 64  # of 8, at so many sequences


_TITLES = {
    "ceilings": "What this GPU can do",
    "mixtral": "Mixtral-8x7B shape, fp8, random weights, 512 in, 128 out",
    "experts": "Distinct experts a layer and step",
    "check": "Every kernel beside its reference",
    "steps": "Decode steps in the engine",
    "kernels": "Kernels",
    "prefill": "Prompts' attention, queries in bf16",
    "qwen3": "Qwen3-0.6B shape, bf16, random weights, 128 in, 64 out",
    "ready": "Seconds from start to ready, kernels compiled before",
    "shapes": "Qwen3-0.6B shape, replicas that share GPUs",
    "ranks": "Mixtral-8x7B shape over several GPUs",
    "peers": "transformers' continuous batching, bf16, in process, all at once",
}


def summary(found: Mapping[str, Any]) -> str:
    lines = ["# GPU figures", ""]
    lines += [f"- {name}: {value}" for name, value in found.get("machine", {}).items()]
    for part in _TITLES:
        lines += ["", *section(part, found)]
    return "\n".join(lines) + "\n"


def section(part: str, found: Mapping[str, Any]) -> list[str]:
    """What is known of a part, as lines."""
    lines = [f"## {_TITLES[part]}", ""]
    given = found.get(part)
    if given is None:
        return [*lines, "not measured"]
    if isinstance(given, Mapping) and "error" in given:
        lines += [f"failed: {given['error']}", ""]
        given = {name: value for name, value in given.items() if name != "error"}
        if not given:
            return lines
    return lines + _WRITERS[part](given)


def _ceilings(figures: Mapping[str, float]) -> list[str]:
    return [f"- {name}: {value:.1f}" for name, value in figures.items()]


def _check(found: Mapping[str, Any]) -> list[str]:
    state = "passed" if found["passed"] else "**FAILED: no figure of these kernels counts**"
    return [f"{state}: {found['result']}", *(f"- {line}" for line in found["wrong"])]


def _experts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        read = f"{row['experts']:.2f}"
        if row["sequences"] == COLLAPSE_AT and row["experts"] < LEAST_EXPERTS:
            read += ": random weights have collapsed the routing, the row of 64 does not count"
        cells.append((row["sequences"], read))
    return _table(("sequences", "experts"), cells)


def _ready(found: Mapping[str, float]) -> list[str]:
    goals = {"mixtral-8x7b": 20, "qwen3-0.6b": 5}
    cells = [(shape, f"{took_s:.1f}", goals.get(shape, "-")) for shape, took_s in found.items()]
    return _table(("model", "s", "to reach"), cells)


def _ranks(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return ["there is one GPU"]
    lines = []
    for name, result in found.items():
        lines += [f"{name}:", "", *_or_failed(result, _served), ""]
    return lines


def _or_failed(
    result: Mapping[str, Any], write: Callable[[Mapping[str, Any]], list[str]]
) -> list[str]:
    """A result that may have an error, and rows that came before it."""
    lines = [f"failed: {result['error']}", ""] if "error" in result else []
    return lines + write(result) if "rows" in result else lines


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


def _prefill(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def shown(row: Mapping[str, Any], by: str) -> str:
        taken = row["seconds"][by]
        return "-" if taken is None else f"{taken * 1e6:.1f} ({row['tflop_s'][by]:.0f})"

    cells = [
        (row["heads"], row["shape"], shown(row, "triton"), shown(row, "flashinfer")) for row in rows
    ]
    head = ("keys and values", "prompts", "Triton us (TFLOP/s)", "FlashInfer us (TFLOP/s)")
    return _table(head, cells)


def _shapes(found: Mapping[str, Any]) -> list[str]:
    lines = [f"GPUs: {found['gpus']}", *(f"- {phase}" for phase in found.get("phases", ()))]
    switches = ", ".join(f"{taken:.1f}" for taken in found.get("switches_s", ())) or "-"
    cells = [
        (found["completed"], found["failed"], f"{found['max_gap_ms']:.0f}",
         f"{found['output_tok_s']:.0f}", switches)
    ]  # fmt: skip
    head = ("completed", "failed", "longest gap ms", "tok/s", "s each switch took")
    return [*lines, "", *_table(head, cells)]


def _steps(models: Mapping[str, Any]) -> list[str]:
    cells = []
    for model, result in models.items():
        if "error" in result:
            cells.append((model, "failed", result["error"], "", "", ""))
            continue
        for r in result["rows"]:
            if "error" in r:
                cells.append((model, r["sequences"], r["error"], "", "", ""))
                continue
            cells.append(
                (model, r["sequences"], f"{r['step_and_ids_ms']:.2f}",
                 f"{r['step_back_to_back_ms']:.2f}",
                 f"{r['step_and_ids_ms'] - r['step_back_to_back_ms']:.2f}",
                 f"{r['first_step_s']:.2f}")
            )  # fmt: skip
    head = (
        "model", "sequences", "ms until the ids are there", "ms back to back",
        "outside kernels, at most 0.30 wanted", "s the first",
    )  # fmt: skip
    return _table(head, cells)


def _latencies(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["level"] != "ok" or not row["completed"]:
        return row["level"], row["level"]
    return f"{row['ttft_ms']['p50']:.1f}", f"{row['tbt_ms']['p50']:.2f}"


def _ready_line(result: Mapping[str, Any]) -> list[str]:
    if "ready_after_s" not in result:
        return []
    took_s = f"{result['ready_after_s']:.1f}"
    return [f"Ready after {took_s} s, kernels compiled that were not before.", ""]


def _served(result: Mapping[str, Any]) -> list[str]:
    cells = [(r["concurrency"], *_latencies(r), f"{r['output_tok_s']:.0f}") for r in result["rows"]]
    head = ("concurrent", "TTFT ms", "TBT ms", "tok/s")
    return [*_ready_line(result), *_table(head, cells)]


def _mixtral(result: Mapping[str, Any]) -> list[str]:
    cells = []
    for row in sorted(result["rows"], key=lambda row: row["concurrency"]):
        count = row["concurrency"]
        goal, published = (
            "{} / {}".format(*pairs[count]) if count in pairs else "-"
            for pairs in (TARGETS, PUBLISHED)
        )
        cells.append((count, *_latencies(row), f"{row['output_tok_s']:.0f}", goal, published))
    head = ("concurrent", "TTFT ms", "TBT ms", "tok/s", "to reach", "published, 8 GPUs")
    return [*_ready_line(result), *_table(head, cells)]


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


_WRITERS: Mapping[str, Callable[[Any], list[str]]] = {
    "ceilings": _ceilings,
    "mixtral": _mixtral,
    "experts": _experts,
    "check": _check,
    "steps": _steps,
    "kernels": _kernels,
    "prefill": _prefill,
    "qwen3": _served,
    "ready": _ready,
    "shapes": _shapes,
    "ranks": _ranks,
    "peers": _peers,
}
