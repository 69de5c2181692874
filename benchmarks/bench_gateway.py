"""Measure gateways: each alone on one core; the load and what stands behind it on another.

    make bench-gateway                                        all; 2 to 3 minutes each, three times
    python benchmarks/bench_gateway.py --gateways scalellm,smg --repeats 1 --seconds 2
    python benchmarks/bench_gateway.py --print                the table of what was measured

Gateways take turns within a repeat; results are kept after each, and a call goes on where an
earlier one ended. What is measured is told in gateway_measures.py.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from document import write_section
from gateway_measures import Amounts, Bench, Figures, Prompts, measure_gateway
from peers import litellm, nginx, smg
from peers.gateway import SCALELLM_GATEWAYS, Cores, Gateway
from peers.system import PeerError

from scalellm.bench.machine import describe_machine
from scalellm.bench.table import milliseconds

ROOT = Path(__file__).resolve().parent.parent
GATEWAYS: tuple[Gateway, ...] = (
    *SCALELLM_GATEWAYS,
    nginx.GATEWAY,
    *smg.GATEWAYS,
    litellm.GATEWAY,
)
SECTION = "gateways"
COLUMNS = (
    ("QPS, 500-byte prompts", ("request_s",)),
    ("CPU us a request", ("cpu_us_request",)),
    ("CPU us a token: flat out, paced", ("cpu_us_chunk", "cpu_us_paced_chunk")),
    ("tokens a write", ("tokens_per_write",)),
    ("added ms, p50, p99: 2,000/s", ("added_2000_p50_ms", "added_2000_p99_ms")),
    ("5,000/s", ("added_5000_p50_ms", "added_5000_p99_ms")),
    ("10,000/s", ("added_10000_p50_ms", "added_10000_p99_ms")),
    ("QPS, 220 KB prompts", ("big_request_s",)),
    (
        "p99 beside those, straight meanwhile",
        ("beside_big_p99_ratio", "beside_big_direct_p99_ratio"),
    ),
    ("p99 at twice the load, refused", ("overload_p99_ratio", "overload_refused_share")),
    ("MiB idle, after those", ("idle_mib", "after_big_mib")),
    ("KiB a held stream", ("held_kib",)),
    ("MiB left of all 5 s later", ("held_left_mib",)),
    ("ready s", ("ready_s",)),
    ("failed", ("failed",)),
)
ABOUT = """\
Each gateway alone on one core; the load and the endpoint (or engine) of set speed behind it share
another, which bounds what the fastest can show. ScaleLLM has keys, metering (SQLite), metrics and
stage times on. Closed loop of 64 with answers of 16 tokens in one piece; tokens: 64 streams flat
out, then 256 streams of one every 20 ms; a write: of those flat out, all calls of write and
writev count, so it is no less; added: end to end at constant arrivals, less the same load sent
straight to the endpoint, medians of five in turn, where the gateway can answer as many; 220 KB:
16 at once, each text new; beside those: p99 of small requests, 200 a second, over their p99
alone, and that of small requests sent straight to the endpoint meanwhile, medians of three, which
is how much of it is the load's; twice the load: with 64 places before an engine of 20 ms, p99 of
what is answered over that at 80% of the load, and the share that is refused; memory is PSS, that
of held streams over the same process's after requests and five seconds of rest. SMG over gRPC is
not measured: there is no engine of its protocols here. Before its own engine ScaleLLM also makes
templates and tokens; the other rows pass text on. `failed`: requests, of all measures. LiteLLM is
measured once.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured so far, kept in one file."""

    path: Path
    started: str
    figures: tuple[Figures, ...] = ()

    @staticmethod
    def open(path: Path, fresh: bool) -> "Record":
        if fresh or not path.exists():
            return Record(path, datetime.now(UTC).isoformat(timespec="seconds"))
        found = json.loads(path.read_text(encoding="utf-8"))
        figures = tuple(Figures(**entry) for entry in found["figures"])
        kept = tuple(entry for entry in figures if entry.error is None)
        return Record(path, found["started"], kept)

    def add(self, figures: Figures) -> "Record":
        added = replace(self, figures=(*self.figures, figures))
        document = {"started": added.started, "figures": [f.to_json() for f in added.figures]}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)
        return added

    def has(self, gateway: str, repeat: int) -> bool:
        return any(f.gateway == gateway and f.repeat == repeat for f in self.figures)


def main(arguments: Sequence[str], command: str | None = None) -> int:
    """`command`: what the table is to say it was measured with; by default this call."""
    options = arguments_parser().parse_args(arguments)
    # A benchmark that is ended ends the server it runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = options.gateways.split(",")
    if unknown := set(names) - {gateway.name for gateway in GATEWAYS}:
        known = ", ".join(gateway.name for gateway in GATEWAYS)
        print(f"--gateways: got {', '.join(sorted(unknown))}; known: {known}", file=sys.stderr)
        return 2
    chosen = [gateway for gateway in GATEWAYS if gateway.name in names]
    options.results.mkdir(parents=True, exist_ok=True)
    record = Record.open(options.results / "gateways.json", options.fresh)
    try:
        if not options.print:
            record = measure(chosen, record, options)
    except PeerError as error:
        print(f"bench_gateway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    own = shlex.join(["python", "benchmarks/bench_gateway.py", *arguments])
    text = f"{ABOUT}\n{about_run(record, command or own)}\n\n{table(record)}"
    print(text)
    if options.docs != "none" and record.figures:
        write_section(Path(options.docs), SECTION, text)
    return 1 if any(figures.error for figures in record.figures) else 0


def arguments_parser() -> argparse.ArgumentParser:
    cache = Path.home() / ".cache" / "scalellm" / "peers"
    parser = argparse.ArgumentParser(description="Measure gateways beside each other.")
    every = ",".join(gateway.name for gateway in GATEWAYS)
    parser.add_argument("--gateways", default=every, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="a measure; %(default)s")
    parser.add_argument("--held", type=int, default=9500, help="streams; default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="s after which no gateway is begun"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(os.environ.get("SCALELLM_PEERS_CACHE", cache))
    )
    parser.add_argument("--results", type=Path, default=ROOT / "target" / "bench-gateway")
    parser.add_argument("--fresh", action="store_true", help="forget what --results holds")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    parser.add_argument("--print", action="store_true", help="the table of --results alone")
    return parser


def measure(chosen: Sequence[Gateway], record: Record, options: argparse.Namespace) -> Record:
    """What `record` lacks of all repeats; what fails is in it with its reason, once."""
    allowed = os.sched_getaffinity(0)
    cores = Cores.of(sorted(allowed))
    options.cache.mkdir(parents=True, exist_ok=True)
    amounts = Amounts(options.seconds, held=options.held)
    results = options.results.resolve()
    prompts = Prompts()
    os.sched_setaffinity(0, {cores.rest})
    try:
        return _take_turns(
            chosen,
            record,
            Bench(amounts, prompts, cores, options.cache.resolve(), results),
            options,
        )
    finally:
        os.sched_setaffinity(0, allowed)


def _take_turns(
    chosen: Sequence[Gateway], record: Record, bench: Bench, options: argparse.Namespace
) -> Record:
    until = time.monotonic() + options.budget
    broken: set[str] = set()
    for repeat in range(options.repeats):
        for gateway in chosen:
            if gateway.name in broken or record.has(gateway.name, repeat):
                continue
            if gateway.slow and repeat > 0:
                continue
            if time.monotonic() > until:
                return record
            begun = time.monotonic()
            folder = bench.folder / f"{gateway.name}-{repeat}-{time.time_ns()}"
            folder.mkdir()
            try:
                gateway.build(bench.cache, folder / "build.log")
                figures = measure_gateway(gateway, repeat, replace(bench, folder=folder))
            except (PeerError, OSError, ValueError) as error:
                figures = Figures(gateway.name, repeat, error=str(error))
                broken.add(gateway.name)
            record = record.add(figures)
            print(f"{time.monotonic() - begun:5.1f} s  {described(figures)}", file=sys.stderr)
    return record


def described(figures: Figures) -> str:
    told = {name: value for name, value in figures.to_json().items() if value is not None}
    cells = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()]
    return ", ".join(cells)


def about_run(record: Record, command: str) -> str:
    machine: dict[str, Any] = describe_machine()
    repeats = 1 + max((figures.repeat for figures in record.figures), default=0)
    return (
        f"Medians of {repeats} repeats, in which the gateways take turns. Begun {record.started} "
        f"on two cores of {machine['cpu']}, with\n\n    {command}"
    )


def table(record: Record) -> str:
    """Markdown, and the reasons of those that are not measured."""
    heads = " | ".join(head for head, _ in COLUMNS)
    lines = [f"| gateway | {heads} |", "|---|" + "---:|" * len(COLUMNS)]
    reasons = []
    for gateway in GATEWAYS:
        every = [figures for figures in record.figures if figures.gateway == gateway.name]
        measured = [figures for figures in every if figures.error is None]
        if measured:
            cells = [_cell(measured, names) for _, names in COLUMNS]
            lines.append(f"| {gateway.about} | " + " | ".join(cells) + " |")
        elif every:
            reason = " ".join((every[-1].error or "").split())
            reasons.append(f"- Not measured: {gateway.about}: {reason[:300]}")
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(reasons) + "\n" if reasons else "")


def _cell(measured: Sequence[Figures], names: Sequence[str]) -> str:
    texts = []
    for name in names:
        values = [value for figures in measured if (value := getattr(figures, name)) is not None]
        middle = statistics.median(values) if values else None
        texts.append(f"{middle:.0f}" if middle and middle >= 1000 else milliseconds(middle))
    return ", ".join(texts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
