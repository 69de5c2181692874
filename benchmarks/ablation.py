"""What each part of an endpoint costs, measured by putting the usual one in the place of ours.

    python benchmarks/ablation.py                      all parts at 1, 8, 64; the table on stdout
    python benchmarks/ablation.py --engine demo --docs docs/performance.md

Before one engine of set speed (25 ms to the first token, 8.5 ms a token: the published figures of a
single stream), or a real one (`--engine demo`), stands

    fastapi-http      a FastAPI front that talks HTTP/1.1 to the engine's own endpoint
    fastapi-request   the same front, a gRPC connection for each request
    fastapi-pool      the same front, one gRPC session for all
    gateway           ScaleLLM's front, its pool of gRPC sessions

so that neighbours differ in one part. Where text is handled is measured on the real engine loop,
with a step of set time (with `--engine demo`: of the model): `loop-text` tokenises and detokenises
in the engine, `loop-ids` does not; ScaleLLM's front stands before both. The engine's own HTTP/1.1
is ScaleLLM's gateway, whose work then counts as HTTP's. Everything shares this machine's cores, the
load too.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from document import write_section
from peers.environment import call, python_environment
from peers.gateway import scalellm_gateway
from peers.measure import Load, Sample, measure
from peers.system import READY_WITHIN_S, Launch, PeerError, free_port, running, tail
from rich.console import Console

import scalellm.demo
from scalellm.bench.table import milliseconds

ROOT = Path(__file__).resolve().parent.parent
PARTS = Path(__file__).resolve().parent / "parts"
MODEL = Path(scalellm.demo.__file__).parent / "model"
TTFT_MS, TBT_MS = 25.0, 8.5
_ENVIRONMENT = "ablation"
_NAME = "ablation"
_FRONTS = {"fastapi-http": "http", "fastapi-request": "request", "fastapi-pool": "pool"}
_LOOPS = ("loop-text", "loop-ids")
_ABOUT = {
    "fake": "What each part of an endpoint costs, by putting the usual one in the place of ours "
    f"([profiling.md](profiling.md)): before an engine set to {TTFT_MS:g} ms and then {TBT_MS:g} "
    "ms a token, p50; CPU seconds are the front's.",
    "demo": "The same before the real engine with the demo model, which computes on the cores that "
    "the fronts need.",
}
SYSTEMS = (*_FRONTS, "gateway", *_LOOPS)


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are made and written."""

    python: Path  # of the environment with FastAPI and grpc
    stubs: Path  # the protocol's Python classes
    scratch: Path


def build(cache: Path, log: Path) -> tuple[Path, Path]:
    """The environment's Python and the protocol's classes, made once."""
    python = python_environment(cache, _ENVIRONMENT, log)
    stubs = cache / _ENVIRONMENT / "stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    proto = ROOT / "proto"
    source = proto / "scalellm" / "engine" / "v1" / "engine.proto"
    protoc = [str(python), "-m", "grpc_tools.protoc", f"-I{proto}"]
    call([*protoc, f"--python_out={stubs}", f"--grpc_python_out={stubs}", str(source)], log)
    return python, stubs


@contextmanager
def engine(name: str, kind: str, place: Place) -> Generator[str, None, None]:
    """Address of the engine that the system `name` has behind it, which listens there."""
    socket = place.scratch / "engine.sock"
    socket.unlink(missing_ok=True)
    address = f"unix:{socket}"
    scalellm_module = (sys.executable, "-m", "scalellm")
    if name in _LOOPS:
        text = ("--text",) if name == "loop-text" else ()
        step = () if kind == "demo" else ("--step-ms", str(TBT_MS))
        script = str(PARTS / "tokenising_engine.py")
        flags = ("--listen", address, "--model", str(MODEL), *step)
        launch = Launch((sys.executable, script, *flags, *text), ready_path=None)
    elif kind == "demo":
        launch = Launch((*scalellm_module, "engine", "demo", "--listen", address), ready_path=None)
    else:
        code = (
            "import json, sys; from scalellm._core import run_fake_engine;"
            f"run_fake_engine(sys.argv[1], json.dumps({fake_settings()!r}))"
        )
        launch = Launch((sys.executable, "-c", code, address), ready_path=None)
    log = place.scratch / "engine.log"
    with running(launch, 0, log):
        until = time.monotonic() + READY_WITHIN_S
        while not socket.exists():
            if time.monotonic() > until:
                raise PeerError(f"the engine does not listen: {tail(log)}")
            time.sleep(0.05)
        yield address


def fake_settings() -> dict[str, object]:
    return {
        "model": "demo",
        "vocab_size": 4096,
        "ttft_ms": TTFT_MS,
        "tbt_ms": TBT_MS,
        "output": {"kind": "count_up", "from": 300},
    }


def measured(
    name: str, kind: str, levels: Sequence[int], load: Load, place: Place
) -> Iterator[Sample]:
    """One system at every level. Raises PeerError."""
    with ExitStack() as stack:
        address = stack.enter_context(engine(name, kind, place))
        port = free_port()
        if name in _FRONTS:
            behind = address
            if name == "fastapi-http":
                http = free_port()
                log = place.scratch / "engine-http.log"
                served = running(scalellm_gateway(http, address), http, log)
                behind = stack.enter_context(served).url
            launch = fastapi_front(port, _FRONTS[name], behind, place)
        else:
            launch = scalellm_gateway(port, address)
        front = stack.enter_context(running(launch, port, place.scratch / f"{name}.log"))
        for concurrency in levels:
            yield measure(front, load, name, concurrency, 0, place.scratch)


def fastapi_front(port: int, link: str, behind: str, place: Place) -> Launch:
    flags = ("--port", str(port), "--link", link, "--engine", behind)
    tokenizer = ("--tokenizer", str(MODEL / "tokenizer.json"))
    command = (str(place.python), str(PARTS / "fastapi_front.py"), *flags, *tokenizer)
    return Launch(command, {"PYTHONPATH": str(place.stubs)})


def table(samples: Sequence[Sample], set_times: bool) -> str:
    """Markdown; with an engine of set speed also what was added to it."""
    added = " | added to TTFT, TBT ms" if set_times else ""
    lines = [
        f"| open | system | TTFT ms | TBT ms{added} | tok/s | CPU s / 1000 tokens |",
        "|---:|---|---:|---:" + ("|---:" if set_times else "") + "|---:|---:|",
    ]
    for sample in sorted(samples, key=lambda s: (s.concurrency, SYSTEMS.index(s.system))):
        cells = [str(sample.concurrency), sample.system]
        cells += [milliseconds(sample.ttft_ms), milliseconds(sample.tbt_ms)]
        if set_times:
            cells.append(_added(sample))
        cells.append(f"{sample.output_tok_s:.0f}")
        cells.append(milliseconds(sample.cpu_s_per_1000_tokens))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _added(sample: Sample) -> str:
    if sample.ttft_ms is None or sample.tbt_ms is None:
        return "-"
    # The loop's first token takes a step.
    first_ms = TBT_MS if sample.system in _LOOPS else TTFT_MS
    return f"{sample.ttft_ms - first_ms:+.2f}, {sample.tbt_ms - TBT_MS:+.2f}"


def main(given: Sequence[str], command: str | None = None) -> int:
    """`command`: what the table is to say it was measured with; by default this call."""
    parser = argparse.ArgumentParser(description="What each part of an endpoint costs.")
    parser.add_argument("--levels", default="1,8,64", help="concurrencies; default: 1,8,64")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="default: all")
    parser.add_argument("--engine", choices=("fake", "demo"), default="fake")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    cache = Path.home() / ".cache" / "scalellm" / "peers"
    parser.add_argument(
        "--cache", type=Path, default=Path(os.environ.get("SCALELLM_PEERS_CACHE", cache))
    )
    parser.add_argument("--docs", type=Path, help="write the table into this document")
    options = parser.parse_args(given)
    systems = options.systems.split(",")
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--systems: got {', '.join(sorted(unknown))}, allowed: {', '.join(SYSTEMS)}")
    levels = [int(number) for number in options.levels.split(",")]
    load = Load(
        timeout_s=60.0,
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        rounds=options.rounds,
        fewest_requests=8,
    )
    console = Console(stderr=True)
    samples: list[Sample] = []
    with TemporaryDirectory(prefix="scalellm-ablation-") as folder:
        scratch = Path(folder)
        options.cache.mkdir(parents=True, exist_ok=True)
        python, stubs = build(options.cache, scratch / "build.log")
        for name in systems:
            place = Place(python, stubs, scratch)
            try:
                for sample in measured(name, options.engine, levels, load, place):
                    samples.append(sample)
                    console.print(table([sample], set_times=False).splitlines()[-1])
                    if sample.error is not None:
                        console.print(f"{name}: {sample.error}", style="red", markup=False)
            except PeerError as error:
                console.print(f"{name}: {error}", style="red", markup=False)
    text = table(samples, set_times=options.engine == "fake")
    print(text)
    if options.docs is not None:
        own = shlex.join(["python", "benchmarks/ablation.py", *given])
        section = f"{_ABOUT[options.engine]}\n\n    {command or own}\n\n{text}"
        write_section(options.docs, f"{_NAME}-{options.engine}", section)
    return 0 if len(samples) == len(systems) * len(levels) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
