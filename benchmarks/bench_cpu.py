"""Measure CPU engines beside the floor of the machine they run on.

    python benchmarks/bench_cpu.py                                     takes hours
    python benchmarks/bench_cpu.py --systems scalellm-int8,openvino-best --levels 1,64 --repeats 1
    python benchmarks/bench_cpu.py --print                             the tables of --results

Systems and load are those of bench_peers.py, which also builds them: Qwen3-0.6B shape, 128 tokens
in, 64 out, a level's requests all at once, through HTTP. Before every repeat the machine's
ceilings are measured (reading memory, register-only int8 and bf16 products, on all cores); from
their medians the floor of each row follows (scalellm/bench/floor.py). A call goes on where an
earlier one ended.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench_peers import ROOT, arguments_parser, choose
from document import write_section
from floors import floor_tables, targets_of
from peers.measure import Load
from peers.record import Record, new_record, read_record
from peers.run import Plan, Run
from peers.system import PeerError
from rich.console import Console

from scalellm import _core
from scalellm.bench.ceilings import measure_ceilings
from scalellm.bench.floor import Ceilings
from scalellm.controller.cores import usable_cores

SECTION = "cpu-floors"
_SYSTEMS = (
    "scalellm,scalellm-int8,scalellm-int4,vllm,vllm-w8a8,openvino-best,llama.cpp-q8_0,"
    "llama.cpp-q4_0"
)


def main(arguments: list[str]) -> int:
    parser = arguments_parser()
    parser.set_defaults(systems=_SYSTEMS, levels=(1, 8, 64), results=ROOT / "target" / "bench-cpu")
    options = parser.parse_args(arguments)
    if options.list or options.build_only or options.start:
        parser.error("--list, --build-only and --start are bench_peers.py's")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = shlex.join(["python", "benchmarks/bench_cpu.py", *arguments])
    try:
        record, ceilings = _measure(options, command)
    except PeerError as error:
        print(f"bench_cpu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    targets = targets_of(record.machine["cpu"])
    text = floor_tables(record, choose(options.systems), ceilings, targets)
    print(text)
    if options.docs != "none":
        write_section(Path(options.docs), SECTION, text)
    return 1 if any(sample.error for sample in record.samples) else 0


def _measure(options: argparse.Namespace, command: str) -> tuple[Record, list[Ceilings]]:
    """All repeats that the results lack, each after the ceilings."""
    results = options.results.resolve()
    path, ceilings_path = results / "systems.json", results / "ceilings.json"
    if options.print:
        return read_record(path), _read(ceilings_path)
    fresh = options.fresh or not path.exists()
    record = new_record(path, command) if fresh else replace(read_record(path), command=command)
    ceilings = [] if fresh else _read(ceilings_path)
    say = Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print
    for repeats in range(1, options.repeats + 1):
        _core.cpu_start(usable_cores(), 0)
        ceilings.append(measure_ceilings())
        results.mkdir(parents=True, exist_ok=True)
        ceilings_path.write_text(json.dumps([asdict(one) for one in ceilings], indent=1) + "\n")
        plan = Plan(
            systems=choose(options.systems),
            levels=options.levels,
            repeats=repeats,
            load=Load(options.timeout),
            cache=options.cache.expanduser().resolve(),
            logs=results / "logs",
        )
        run = Run(plan, record, say)
        run.run()
        record = run.record
    return record, ceilings


def _read(path: Path) -> list[Ceilings]:
    """Raises PeerError where a record has no ceilings beside it."""
    try:
        found: Sequence[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [Ceilings(**fields) for fields in found]
    except (OSError, ValueError, TypeError) as error:
        raise PeerError(f"{path}: no ceilings: {error}; --fresh begins anew") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
