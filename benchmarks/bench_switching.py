"""A real deployment under load that steps 1 -> 64 -> 1, `auto` beside both static plans.

    python benchmarks/bench_switching.py                        all parts, then docs/performance.md
    python benchmarks/bench_switching.py --short --docs none    a few seconds a level
    python benchmarks/bench_switching.py --part memory-wide     one part; the rest another time

Two device slots of one core each: one replica of two ranks against two of one. First both static
plans, which tell whether this machine has a crossover: the wide replica quicker for one stream, the
narrow ones making more tokens for 64, both by CLEAR. Where it has none, ranks exchange over a link
of LINK_MB_S, as if over a slow network, which makes one, and all is measured again with that.
Last `auto` where memory is not enough for two shapes: the new one comes after the old one is gone.

Each part is one deployment under all three levels, its outcome a file of --folder, so that parts
can be measured one at a time. The load generator and the gateway run on the same two cores.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from blueprint import series
from blueprint.deployment import AUTO, Watch, calibrate, deployed, loaded, model_folder
from document import write_section

from scalellm.bench.machine import describe_machine
from scalellm.bench.plan import Level, Workload
from scalellm.bench.records import Records

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "qwen3-0.3b"
LINK_MB_S = 400
LINKS = {"memory": 0, "link": LINK_MB_S}
NAMES = {"wide": "1 x TP 2", "narrow": "2 x TP 1", "auto": AUTO, "after": "`--switch after`"}
SWITCHES = {"auto": "beside", "after": "after"}
FEW, MANY = 1, 64
SECONDS = {"static": (10.0, 40.0, 10.0), "auto": (12.0, 60.0, 40.0)}
SHORT_SECONDS = {"static": (4.0, 8.0, 2.0), "auto": (8.0, 25.0, 20.0)}
CLEAR = 1.25  # times as good: the policy moves for 1.11, and back for this
LEAST_OF_BEST = 0.9
MOST_PAUSE_MS = 1500.0
MOST_PAUSE_AFTER_MS = 5000.0  # of 64 streams whose tokens are all computed again at once
Found = Mapping[str, Any]


def measure(part: str, folder: Path, seconds: Sequence[float]) -> Found:
    """One deployment under all levels."""
    link, name = part.split("-")
    model = model_folder(SHAPE, folder)
    flags: tuple[str, ...] = ()
    if name in SWITCHES:
        file = folder / f"calibration-{link}.toml"
        if not file.is_file():
            calibrate(model, LINKS[link], file)
        journal = folder / f"{part}.jsonl"
        journal.unlink(missing_ok=True)
        flags = ("--calibration", str(file), "--journal", str(journal))
        flags += ("--switch", SWITCHES[name])
    load = zip((FEW, MANY, FEW), seconds, strict=True)
    levels = [Level(streams, duration_s=duration_s) for streams, duration_s in load]
    log = folder / f"{part}.log"
    with (
        deployed(model, _plan(name), LINKS[link], log, flags) as running,
        Watch(running.url) as watch,
    ):
        rows = loaded(running.url, levels, Workload(record_gaps=True)).rows
    moves = series.switches(watch.seen)
    pauses = series.pauses_ms(rows, series.hand_overs(watch.seen))
    told = []
    for row in rows:
        level = series.span_of(row)
        rest = series.settled(level, moves)
        told.append(
            {
                "concurrency": row["concurrency"],
                "completed": row["completed"],
                # A server that vanished may look like one that let go of an idle connection.
                "failed": row["failed"] + row["timed_out"] + row["resent"],
                "wrong_length": sum(
                    one["output_tokens"] != Workload().output_tokens
                    for one in Records.of(row).completed()
                ),
                "tok_s": series.tokens_s(row, level),
                "tbt_ms": series.tbt_ms(row, level),
                "settled_s": rest.end_s - rest.begin_s,
                "settled_tok_s": series.tokens_s(row, rest),
                "settled_tbt_ms": series.tbt_ms(row, rest),
                "max_gap_ms": row["max_gap_ms"]["max"],
            }
        )
    return {
        "levels": told,
        "switches": [asdict(move) for move in moves],
        "seen": [asdict(one) for one in watch.seen],
        "pauses_ms": pauses,
        "machine": describe_machine()["cpu"],
        "seconds": list(seconds),
    }


def _plan(name: str) -> str:
    return AUTO if name in SWITCHES else NAMES[name]


def has_crossover(wide: Found, narrow: Found) -> bool:
    """Whether each plan is clearly the better one at one of the levels."""
    return bool(
        CLEAR * wide["levels"][0]["tbt_ms"] <= narrow["levels"][0]["tbt_ms"]
        and narrow["levels"][1]["tok_s"] >= CLEAR * wide["levels"][1]["tok_s"]
    )


def lacking(found: Mapping[str, Found]) -> list[str]:
    """The parts that are still to be measured, in order."""
    parts = ["memory-wide", "memory-narrow", "memory-auto"]
    if all(part in found for part in parts[:2]):
        crosses = has_crossover(found["memory-wide"], found["memory-narrow"])
        if not crosses:
            parts += ["link-wide", "link-narrow", "link-auto"]
        parts.append("memory-after" if crosses else "link-after")
    return [part for part in parts if part not in found]


def read(folder: Path) -> dict[str, Found]:
    files = sorted(folder.glob("part-*.json"))
    return {
        file.stem.removeprefix("part-"): json.loads(file.read_text(encoding="utf-8"))
        for file in files
    }


def ratios(found: Mapping[str, Found], link: str) -> list[tuple[str, float, float]]:
    """For each level, `auto` by the better static plan: after its switch, and over the whole."""
    auto = found[f"{link}-auto"]["levels"]
    plans = [found[f"{link}-{name}"]["levels"] for name in ("wide", "narrow")]
    told = []
    for at, level in enumerate(auto):
        if level["concurrency"] == FEW:
            best = min(plan[at]["tbt_ms"] for plan in plans)
            told.append(("TBT", best / level["settled_tbt_ms"], best / level["tbt_ms"]))
        else:
            best = max(plan[at]["tok_s"] for plan in plans)
            told.append(("tokens/s", level["settled_tok_s"] / best, level["tok_s"] / best))
    return told


def failures(found: Mapping[str, Found]) -> list[str]:
    """What is not as it is meant to be."""
    told = [
        f"{part}: requests failed at {level['concurrency']}"
        for part, one in found.items()
        for level in one["levels"]
        if level["failed"] or level["wrong_length"]
    ]
    for link in LINKS:
        if f"{link}-auto" not in found:
            continue
        auto = found[f"{link}-auto"]
        crosses = has_crossover(found[f"{link}-wide"], found[f"{link}-narrow"])
        if crosses and len(auto["switches"]) != 2:
            told.append(f"{link}: {len(auto['switches'])} switches, one each way was due")
        if not crosses and len(auto["switches"]) > 2:
            told.append(f"{link}: {len(auto['switches'])} switches, at most one a step was due")
        for what, settled, _ in ratios(found, link):
            if not settled >= LEAST_OF_BEST:
                told.append(f"{link}: {what} is {settled:.2f} of the better plan's")
        if p99(auto["pauses_ms"]) > MOST_PAUSE_MS:
            told.append(f"{link}: pauses of {p99(auto['pauses_ms']):.0f} ms")
        if f"{link}-after" in found:
            after = found[f"{link}-after"]
            if len(after["switches"]) != 2:
                told.append(f"{link}: {len(after['switches'])} switches one after the other, not 2")
            if p99(after["pauses_ms"]) > MOST_PAUSE_AFTER_MS:
                told.append(f"{link}: pauses of {p99(after['pauses_ms']):.0f} ms between shapes")
    if "link-wide" in found and not has_crossover(found["link-wide"], found["link-narrow"]):
        told.append("the slow link makes no crossover either")
    return told


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0


def section(found: Mapping[str, Found], command: str) -> str:
    """The Markdown between the markers of docs/performance.md."""
    first = found["memory-wide"]
    lines = [
        (
            f"{SHAPE} shape, random weights, int8, 128 tokens in, 64 out, closed loops of 1, 64 "
            f"and 1 streams for {_listed(first['seconds'])} s (`auto`: "
            f"{_listed(found['memory-auto']['seconds'])} s), on two slots of one core each, "
            f"{first['machine']}; gateway and load generator on the same two cores. With"
            f"\n\n    {command}\n"
        ),
        (
            "| exchange by | plan | 1 stream: TBT ms | 64: tok/s | 64: TBT ms | 1 again: TBT ms | "
            "switches | largest gap ms | failed |"
        ),
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for link in LINKS:
        lines += [_line(found, link, name) for name in NAMES if f"{link}-{name}" in found]
    crosses = has_crossover(first, found["memory-narrow"])
    lines.append(
        "\nIn memory this machine "
        + (
            f"has a crossover: each plan is {CLEAR} times as good as the other at its level."
            if crosses
            else f"has no clear crossover (each plan {CLEAR} times as good as the other at its "
            f"level), so ranks exchanged over a link of {LINK_MB_S} MB/s (`--link-mb-s`), too."
        )
    )
    for link in LINKS:
        if f"{link}-auto" in found:
            lines.append(_sentence(found, link))
        if f"{link}-after" in found:
            lines.append(f"Without room for both shapes: {_gaps(found[f'{link}-after'])}.")
    if problems := failures(found):
        lines.append(f"Goals that this run misses: {'; '.join(problems)}.")
    return "\n".join(lines) + "\n"


def _listed(seconds: Sequence[float]) -> str:
    return ", ".join(f"{one:g}" for one in seconds)


def _line(found: Mapping[str, Found], link: str, name: str) -> str:
    one = found[f"{link}-{name}"]
    few, many, again = one["levels"]
    cells = [
        "memory" if link == "memory" else f"{LINK_MB_S} MB/s",
        NAMES[name],
        f"{few['tbt_ms']:.2f}",
        f"{many['tok_s']:,.0f}",
        f"{many['tbt_ms']:.1f}",
        f"{again['tbt_ms']:.2f}",
        str(len(one["switches"])),
        f"{max(level['max_gap_ms'] for level in one['levels']):,.0f}",
        str(sum(level["failed"] + level["wrong_length"] for level in one["levels"])),
    ]
    return "| " + " | ".join(cells) + " |"


def _sentence(found: Mapping[str, Found], link: str) -> str:
    auto = found[f"{link}-auto"]
    parts = [
        f"{what} {settled:.2f} ({whole:.2f} over the whole level)"
        for what, settled, whole in ratios(found, link)
    ]
    by = "memory" if link == "memory" else "the slow link"
    text = f"By {by}, `auto` has of the better static plan, after its switch: " + ", ".join(parts)
    return f"{text}. Its {_gaps(auto)}." if auto["switches"] else f"{text}."


def _gaps(found: Found) -> str:
    took = ", ".join(f"{one['end_s'] - one['begin_s']:.1f}" for one in found["switches"])
    text = f"switches took {took or 'no'} s"
    if pauses := found["pauses_ms"]:
        text += (
            f"; the largest gap of each of the {len(pauses)} requests that ran during one: "
            f"p50 {np.percentile(pauses, 50):,.0f} ms, p99 {p99(pauses):,.0f} ms"
        )
    return text


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/scalellm/switching")
    parser.add_argument("--part", action="append", help="e.g. memory-wide; default: what lacks")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--short", action="store_true", help="short levels, in a folder of its own")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    options = parser.parse_args(given)
    folder = options.folder / "short" if options.short else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for part in read(folder):
            (folder / f"part-{part}.json").unlink()
    while parts := options.part or lacking(read(folder)):
        for part in parts:
            print(f"{part} ...", flush=True)
            lengths = SHORT_SECONDS if options.short else SECONDS
            found = measure(
                part, folder, lengths["auto" if part.split("-")[1] in SWITCHES else "static"]
            )
            text = json.dumps(found, indent=1)
            (folder / f"part-{part}.json").write_text(text + "\n", encoding="utf-8")
            print(json.dumps(found["levels"], indent=1), flush=True)
        if options.part:
            break
    found = read(folder)
    if lacking(found):
        print(f"still to be measured: {', '.join(lacking(found))}")
        return 0
    shown = shlex.join(["python", "benchmarks/bench_switching.py", *given])
    text = section(found, shown)
    print(text)
    if options.docs != "none":
        write_section(Path(options.docs), "blueprint-real", text)
    problems = failures(found)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
