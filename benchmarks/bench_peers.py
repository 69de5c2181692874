"""Measure ScaleLLM and other servers on this machine, in turns, with the same load and weights.

    python benchmarks/bench_peers.py                               everything; takes hours
    python benchmarks/bench_peers.py --systems scalellm-int8,vllm,openvino-best --levels 1,8,64
    python benchmarks/bench_peers.py --systems scalellm-gateway,smg,litellm
    python benchmarks/bench_peers.py --list
    python benchmarks/bench_peers.py --build-only --systems vllm   environment and model only
    python benchmarks/bench_peers.py --start vllm                  run it until Ctrl-C

Servers: Qwen3-0.6B shape, the same seeded random weights for all; 128 tokens in, 64 out, greedy,
end of sequence ignored; a level's requests are sent all at once. Gateways: 64 tokens in, 16 out,
before an engine of set speed. A call goes on where an earlier one with the same --results
ended, and measures what is missing.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from document import write_section
from peers import (
    litellm,
    llama_cpp,
    openvino,
    scalellm_serve,
    smg,
    transformers_serve,
    vllm,
)
from peers.gateway import SCALELLM_GATEWAY, Backend, Gateway, backend
from peers.measure import Load
from peers.plot import plot_throughput
from peers.record import Record, new_record, read_record
from peers.run import Plan, Run, build, start
from peers.system import PeerError, System
from peers.tables import gateway_tables, system_tables
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
SERVERS = (scalellm_serve, vllm, openvino, llama_cpp, transformers_serve)
SYSTEMS: tuple[System, ...] = tuple(system for module in SERVERS for system in module.SYSTEMS)
GATEWAYS: tuple[Gateway, ...] = (SCALELLM_GATEWAY, smg.GATEWAY, litellm.GATEWAY)
PICTURE = "peers-throughput.svg"
SYSTEMS_SECTION, GATEWAYS_SECTION = "peers-qwen3-0.6b", "gateways"
# Short answers in great number: a gateway's cost is per request and per chunk.
GATEWAY_LOAD = Load(
    timeout_s=60.0,
    endpoint="chat",
    input_tokens=64,
    output_tokens=16,
    rounds=100,
    fewest_requests=2000,
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `--systems` names: servers and gateways are measured apart."""

    systems: tuple[System, ...]
    gateways: tuple[Gateway, ...]


def choose(names: str | None) -> Chosen:
    """Those of a list of names. Raises PeerError for unknown ones."""
    known = [system.name for system in SYSTEMS] + [gateway.name for gateway in GATEWAYS]
    wanted = known if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise PeerError(f"systems: got {', '.join(unknown)}; known: {', '.join(known)}")
    return Chosen(
        tuple(system for system in SYSTEMS if system.name in wanted),
        tuple(gateway for gateway in GATEWAYS if gateway.name in wanted),
    )


def levels(text: str) -> tuple[int, ...]:
    return tuple(int(level) for level in text.split(","))


def arguments_parser() -> argparse.ArgumentParser:
    cache = Path.home() / ".cache" / "scalellm" / "peers"
    parser = argparse.ArgumentParser(description="Measure ScaleLLM beside other servers.")
    parser.add_argument("--systems", help="names of --list, comma between; default: all")
    parser.add_argument(
        "--levels", type=levels, default="1,2,4,8,16,32,64", help="of servers; %(default)s"
    )
    parser.add_argument("--gateway-levels", type=levels, default="1,16,64", help="%(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="s a request may take; default: %(default)s"
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
        help="folder of systems.json, gateways.json and logs; default: %(default)s",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what --results holds")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="the names")
    only.add_argument("--build-only", action="store_true")
    only.add_argument("--start", metavar="SYSTEM")
    only.add_argument("--print", action="store_true", help="the tables of --results, no measuring")
    return parser


def main(arguments: list[str]) -> int:
    options = arguments_parser().parse_args(arguments)
    # A benchmark that is ended ends the server it runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        chosen = choose(options.start or options.systems)
        if options.list:
            return _list(chosen)
        if options.build_only:
            return _build_all(chosen, options)
        if options.start:
            return _start(chosen, options)
        return _measure(
            chosen, options, shlex.join(["python", "benchmarks/bench_peers.py", *arguments])
        )
    except PeerError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _plan(systems: Sequence[System], options: argparse.Namespace) -> Plan:
    return Plan(
        systems=tuple(systems),
        levels=options.levels,
        repeats=options.repeats,
        load=Load(options.timeout),
        cache=options.cache.expanduser().resolve(),
        logs=options.results.resolve() / "logs",
    )


def _measure(chosen: Chosen, options: argparse.Namespace, command: str) -> int:
    failed = False
    if chosen.systems:
        record = _record(options, "systems.json", command)
        if not options.print:
            record = _run(_plan(chosen.systems, options), record)
        text = system_tables(record, chosen.systems)
        if options.docs != "none" and any(sample.completed for sample in record.samples):
            picture = Path(options.docs).with_name(PICTURE)
            plot_throughput(record, chosen.systems, picture)
            text += f"\n![Output tokens a second over concurrent requests]({picture.name})\n"
        failed |= _publish(record, text, SYSTEMS_SECTION, options)
    if chosen.gateways:
        record = _record(options, "gateways.json", command)
        if not options.print:
            plan = replace(_plan((), options), levels=options.gateway_levels, load=GATEWAY_LOAD)
            with backend(plan.logs) as behind:
                systems = tuple(_before(gateway, behind) for gateway in chosen.gateways)
                record = _run(replace(plan, systems=systems), record)
        text = gateway_tables(record, chosen.gateways, GATEWAY_LOAD)
        failed |= _publish(record, text, GATEWAYS_SECTION, options)
    return 1 if failed else 0


def _before(gateway: Gateway, behind: Backend) -> System:
    """The gateway as a system to measure, passing on to `behind`."""
    return System(
        gateway.name,
        gateway.about,
        "",
        gateway.build,
        lambda cache, port: gateway.launch(cache, port, behind),
    )


def _record(options: argparse.Namespace, name: str, command: str) -> Record:
    """What an earlier call measured, or a new record."""
    path = options.results.resolve() / name
    if options.print:
        return read_record(path)
    if options.fresh or not path.exists():
        return new_record(path, command)
    return replace(read_record(path), command=command)


def _run(plan: Plan, record: Record) -> Record:
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    measuring = Run(plan, record, console.print)
    measuring.run()
    return measuring.record


def _publish(record: Record, text: str, section: str, options: argparse.Namespace) -> bool:
    """Print the tables and write them down; whether anything failed."""
    print(text)
    if options.docs != "none":
        write_section(Path(options.docs), section, text)
    return any(sample.error for sample in record.samples)


def _list(chosen: Chosen) -> int:
    for system in chosen.systems:
        print(f"{system.name:<24}{system.about}, {system.precision}")
    for gateway in chosen.gateways:
        print(f"{gateway.name:<24}{gateway.about}, a gateway")
    return 0


def _build_all(chosen: Chosen, options: argparse.Namespace) -> int:
    plan, failed = _plan(chosen.systems, options), 0
    every: list[System | Gateway] = [*chosen.systems, *chosen.gateways]
    for system in every:
        print(f"building {system.name}", flush=True)
        try:
            build(system, plan)
        except (PeerError, OSError) as error:
            print(f"{system.name}: {error}")
            failed += 1
    return 1 if failed else 0


def _start(chosen: Chosen, options: argparse.Namespace) -> int:
    if not chosen.systems:
        raise PeerError("start: only servers can be started by themselves, no gateways")
    (system,) = chosen.systems
    plan = _plan(chosen.systems, options)
    build(system, plan)
    with start(system, plan) as server:
        print(f"ready {server.url} after {server.ready_after_s:.1f} s", flush=True)
        while server.processes.members():
            time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
