"""Does `scalellm bench serve` say what vLLM's own `vllm bench serve` says of the same server?

    python benchmarks/cross_check.py                          ScaleLLM, Qwen3-0.6B's shape, int8
    python benchmarks/cross_check.py --engine fake            its front, an engine of set speed
    python benchmarks/cross_check.py --url http://127.0.0.1:8000 --model demo --tokenizer FOLDER
    python benchmarks/cross_check.py --levels 1,8 --repeats 5 --docs docs/benchmarking.md

Both ask for the same lengths at the same concurrency, in turns; vLLM's runs in the environment of
bench_peers.py. A server that is started here has half of the cores and its clients the other half:
one of them is written in Python, and what it takes from its server it would measure as the server's
time. Medians of each run's median; the exit code is 1 where they are over 5% apart.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from document import write_section
from peers import scalellm_serve, vllm, weights
from peers.environment import call
from peers.system import free_port, running
from rich.console import Console

import scalellm.demo
from scalellm.bench.front import front_alone
from scalellm.bench.plan import Level, Workload
from scalellm.bench.serve import Options, run_bench

MODEL = Path(scalellm.demo.__file__).parent / "model"
SHAPE = "qwen3-0.6b"
TTFT_MS, TBT_MS = 50.0, 10.0
INPUT_TOKENS, OUTPUT_TOKENS = 128, 64
AGREE_WITHIN = 0.05
WARMUPS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """Medians over one run's requests, ms."""

    ttft_ms: float
    tbt_ms: float


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    model: str
    tokenizer: Path


def ours(server: Server, level: Level, seed: int) -> Run:
    workload = Workload(
        input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=seed
    )
    options = Options(server.url, (level,), workload, model=server.model)
    (row,) = run_bench(options, Console(quiet=True)).rows
    return Run(row["ttft_ms"]["p50"], row["tbt_ms"]["p50"])


def vllms(server: Server, level: Level, seed: int, program: Path, folder: Path) -> Run:
    values = {
        "backend": "openai",
        "base-url": server.url,
        "model": server.model,
        "tokenizer": server.tokenizer,
        "dataset-name": "random",
        "random-input-len": INPUT_TOKENS,
        "random-output-len": OUTPUT_TOKENS,
        "num-prompts": level.requests,
        "max-concurrency": level.concurrency,
        "num-warmups": WARMUPS,
        "temperature": 0,
        "seed": seed,
        "result-dir": folder,
        "result-filename": "vllm.json",
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    flags += ["--ignore-eos", "--save-result", "--disable-tqdm"]
    command = [str(program), "bench", "serve", *flags]
    call(command, folder / "vllm.log", {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
    found = json.loads((folder / "vllm.json").read_text(encoding="utf-8"))
    if found["completed"] != level.requests:
        raise RuntimeError(f"vLLM's bench completed {found['completed']} of {level.requests}")
    return Run(found["median_ttft_ms"], found["median_tpot_ms"])


def table(found: dict[int, tuple[list[Run], list[Run]]]) -> tuple[str, bool]:
    """Markdown, and whether all agree."""
    lines = [
        "| open | | vllm bench serve | scalellm bench serve | ratio |",
        "|---:|---|---:|---:|---:|",
    ]
    agree = True
    for concurrency, (theirs, own) in found.items():
        for name, field in (("TTFT ms", "ttft_ms"), ("TPOT ms", "tbt_ms")):
            one = statistics.median(getattr(run, field) for run in theirs)
            other = statistics.median(getattr(run, field) for run in own)
            agree &= abs(other / one - 1.0) <= AGREE_WITHIN
            lines.append(
                f"| {concurrency} | {name} | {one:.2f} | {other:.2f} | {other / one:.3f} |"
            )
    return "\n".join(lines) + "\n", agree


def keep_to(cores: set[int]) -> None:
    """Of this process and of those that it starts; no matter where there is one core."""
    os.sched_setaffinity(0, cores or os.sched_getaffinity(0))


@contextmanager
def served(options: argparse.Namespace, folder: Path) -> Generator[Server, None, None]:
    if options.url is not None:
        yield Server(options.url, options.model, options.tokenizer)
        return
    if options.engine == "fake":
        with front_alone({"ttft_ms": TTFT_MS, "tbt_ms": TBT_MS}) as url:
            yield Server(url, "demo", MODEL)
        return
    cache, log, port = options.cache.expanduser().resolve(), folder / "scalellm.log", free_port()
    system = scalellm_serve.systems(SHAPE)[0]
    system.build(cache, log)
    with running(system.launch(cache, port), port, log) as started:
        yield Server(started.url, "peer", weights.bf16_folder(cache, SHAPE))


def main(arguments: Sequence[str], command: str | None = None) -> int:
    """`command`: what the table is to say it was measured with; by default this call."""
    cache = Path.home() / ".cache" / "scalellm" / "peers"
    parser = argparse.ArgumentParser(description="Compare with vLLM's own bench.")
    parser.add_argument("--url", help="of a server that runs; default: ScaleLLM, started here")
    parser.add_argument(
        "--engine",
        choices=("int8", "fake"),
        default="int8",
        help=f"without --url: {SHAPE} in int8, or one of set speed; default: %(default)s",
    )
    parser.add_argument("--model", default="demo", help="with --url; default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, default=MODEL, help="with --url: its folder")
    parser.add_argument("--levels", default="1,8,32", help="concurrencies; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=Path(os.environ.get("SCALELLM_PEERS_CACHE", cache))
    )
    parser.add_argument("--docs", type=Path, help="write the table into this document")
    options = parser.parse_args(arguments)
    levels = [
        Level(concurrency, requests=max(16, 4 * concurrency), warmup=WARMUPS)
        for concurrency in map(int, options.levels.split(","))
    ]
    found: dict[int, tuple[list[Run], list[Run]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        cores = sorted(os.sched_getaffinity(0))
        stack.callback(keep_to, set(cores))
        if options.url is None:
            keep_to(set(cores[: len(cores) // 2]))
        server = stack.enter_context(served(options, folder))
        if options.url is None:
            keep_to(set(cores[len(cores) // 2 :]))
        program = vllm.bench_program(options.cache.expanduser().resolve(), folder / "vllm.log")
        seeds = itertools.count()  # prompts sent twice would be found in the server's cache
        for _ in range(options.repeats):
            for level in levels:
                theirs, own = found.setdefault(level.concurrency or 0, ([], []))
                theirs.append(vllms(server, level, next(seeds), program, folder))
                own.append(ours(server, level, next(seeds)))
                print(f"{level.label} open: {theirs[-1]} {own[-1]}", file=sys.stderr)
    text, agree = table(found)
    print(text)
    if options.docs is not None:
        called = shlex.join(["python", "benchmarks/cross_check.py", *arguments])
        about = f"Medians of {options.repeats} repeats in turns:\n\n    {command or called}\n\n"
        write_section(options.docs, "cross-check", about + text)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
