"""Measure ScaleLLM and other servers on this machine, in turns, with the same load and weights.

    python benchmarks/bench_peers.py                               everything; takes hours
    python benchmarks/bench_peers.py --systems scalellm-int8,vllm,openvino-best --levels 1,8,64
    python benchmarks/bench_peers.py --shape mixtral-1b --budget 600 --timeout 60
    python benchmarks/bench_peers.py --list
    python benchmarks/bench_peers.py --build-only --systems vllm   environment and model only
    python benchmarks/bench_peers.py --start vllm                  run it until Ctrl-C

The same seeded random weights for all; 128 tokens in, 64 out, greedy, end of sequence ignored; a
level's requests are sent all at once. A call goes on where an earlier one with the same --results
ended, and measures what is missing. Gateways: bench_gateway.py.
"""

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from document import write_section
from peers import llama_cpp, openvino, scalellm_serve, transformers_serve, vllm, weights
from peers.measure import Load
from peers.plot import plot_throughput
from peers.record import Record, new_record, read_record
from peers.run import Plan, Run, build, start
from peers.system import PeerError, System
from peers.tables import system_tables
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
SERVERS = (scalellm_serve, openvino, llama_cpp, vllm, transformers_serve)


def choose(names: str | None, shape: str = weights.QWEN3) -> tuple[System, ...]:
    """Those of a list of names, or all. Raises PeerError for unknown ones."""
    every = tuple(system for module in SERVERS for system in module.systems(shape))
    known = [system.name for system in every]
    wanted = known if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise PeerError(f"systems: got {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(system for system in every if system.name in wanted)


def levels(text: str) -> tuple[int, ...]:
    return tuple(int(level) for level in text.split(","))


def arguments_parser() -> argparse.ArgumentParser:
    cache = Path.home() / ".cache" / "scalellm" / "peers"
    parser = argparse.ArgumentParser(description="Measure ScaleLLM beside other servers.")
    parser.add_argument("--systems", help="names of --list, comma between; default: all")
    parser.add_argument(
        "--levels", type=levels, default="1,2,4,8,16,32,64", help="default: %(default)s"
    )
    parser.add_argument(
        "--shape", choices=weights.SHAPES, default=weights.QWEN3, help="default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="s a request may take; with 60 nothing above a `timeout` is run; default: %(default)s",
    )
    parser.add_argument(
        "--fewest", type=int, default=4, help="requests of a level at least; default: %(default)s"
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="s after which nothing more is begun"
    )
    parser.add_argument(
        "--once-after",
        type=float,
        default=math.inf,
        help="s: a system whose levels take longer is measured once",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("SCALELLM_PEERS_CACHE", cache)),
        help="environments and models; default: $SCALELLM_PEERS_CACHE or ~/.cache/scalellm/peers",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "target" / "bench-peers",
        help="folder of records and logs; default: %(default)s",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what --results holds")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="the names")
    only.add_argument("--build-only", action="store_true")
    only.add_argument("--start", metavar="SYSTEM")
    only.add_argument("--print", action="store_true", help="the tables of --results, no measuring")
    return parser


def main(arguments: list[str], command: str | None = None) -> int:
    """`command`: what the tables are to say they were measured with; by default this call."""
    options = arguments_parser().parse_args(arguments)
    # A benchmark that is ended ends the server it runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        systems = choose(options.start or options.systems, options.shape)
        if options.list:
            return _list(systems)
        if options.build_only:
            return _build_all(systems, options)
        if options.start:
            return _start(systems, options)
        own = shlex.join(["python", "benchmarks/bench_peers.py", *arguments])
        return _measure(systems, options, command or own)
    except PeerError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _plan(systems: tuple[System, ...], options: argparse.Namespace) -> Plan:
    return Plan(
        systems=systems,
        levels=options.levels,
        repeats=options.repeats,
        load=Load(options.timeout, fewest_requests=options.fewest),
        cache=options.cache.expanduser().resolve(),
        logs=options.results.resolve() / "logs",
        budget_s=options.budget,
        once_after_s=options.once_after,
    )


def _measure(systems: tuple[System, ...], options: argparse.Namespace, command: str) -> int:
    record = _record(options, command)
    if not options.print:
        console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        measuring = Run(_plan(systems, options), record, console.print)
        measuring.run()
        record = measuring.record
    # Also what an earlier call measured.
    every = choose(None, options.shape)
    text = system_tables(record, every, options.shape)
    print(text)
    if options.docs != "none" and any(sample.completed for sample in record.samples):
        picture = Path(options.docs).with_name(f"peers-{options.shape}.svg")
        plot_throughput(record, every, picture)
        text += f"\n![Output tokens a second over concurrent requests]({picture.name})\n"
        write_section(Path(options.docs), f"peers-{options.shape}", text)
    return 1 if any(sample.error for sample in record.samples) else 0


def _record(options: argparse.Namespace, command: str) -> Record:
    """What an earlier call measured, or a new record."""
    path = options.results.resolve() / f"{options.shape}.json"
    if options.print:
        return read_record(path)
    if options.fresh or not path.exists():
        return new_record(path, command)
    return replace(read_record(path), command=command)


def _list(systems: Sequence[System]) -> int:
    for system in systems:
        print(f"{system.name:<24}{system.about}, {system.precision}")
    return 0


def _build_all(systems: tuple[System, ...], options: argparse.Namespace) -> int:
    plan, failed = _plan(systems, options), 0
    for system in systems:
        print(f"building {system.name}", flush=True)
        try:
            build(system, plan)
        except (PeerError, OSError) as error:
            print(f"{system.name}: {error}")
            failed += 1
    return 1 if failed else 0


def _start(systems: tuple[System, ...], options: argparse.Namespace) -> int:
    (system,) = systems
    plan = _plan(systems, options)
    build(system, plan)
    with start(system, plan) as server:
        print(f"ready {server.url} after {server.ready_after_s:.1f} s", flush=True)
        while server.processes.members():
            time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
