"""Measure `scalellm serve` on the Qwen3-0.6B shape with random weights, and write it down.

    python benchmarks/serve_qwen3.py                           bf16 at 1, 8 and 64
    python benchmarks/serve_qwen3.py --levels 1,8 --docs none  leaves docs/performance.md alone

128 tokens in, 64 out, greedy, end of sequence ignored; a level's requests are sent all at once
(at 1, one after the other). The server is a child of this script and is ended by its process id.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import make_shape
from document import write_section
from rich.console import Console

from scalellm.bench.plan import Level, Workload
from scalellm.bench.results import Result
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.table import markdown_table, print_result

ROOT = Path(__file__).resolve().parent.parent
READY_WITHIN_S = 900.0
STOPPED_WITHIN_S = 60.0
# One request at a time says little; it is asked this often.
SINGLE_REQUESTS = 4
WARMUP_REQUESTS = 2
# Slow systems are to be measured too, not only called slow.
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    ready_after_s: float


@contextmanager
def serving(folder: Path, flags: list[str], log: Path) -> Generator[Server, None, None]:
    """Run `scalellm serve` on a free port until the block ends.

    Raises RuntimeError, with the end of its log, if it ends or is not ready in time.
    """
    command = [sys.executable, "-m", "scalellm", "serve", str(folder), "--load-format", "dummy"]
    command += ["--port", "0", *flags]
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        url = _ready_url(process)
        if url is None:
            raise RuntimeError(f"serve was not ready\n{log.read_text(encoding='utf-8')[-4000:]}")
        yield Server(url, time.monotonic() - begun)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready_url(process: "subprocess.Popen[str]") -> str | None:
    """The URL of the ready line; None if the process ended or took too long."""
    assert process.stdout is not None
    late = threading.Timer(READY_WITHIN_S, process.terminate)
    late.start()
    try:
        for line in process.stdout:
            if line.startswith("ready "):
                return line.split()[1]
        return None
    finally:
        late.cancel()


def level(concurrency: int) -> Level:
    requests = SINGLE_REQUESTS if concurrency == 1 else concurrency
    return Level(concurrency, requests=requests, warmup=WARMUP_REQUESTS)


def section(result: Result, server: Server, command: str) -> str:
    """The Markdown between the markers of docs/performance.md."""
    machine, workload = result.machine, result.workload
    rows = markdown_table(result.rows)
    flags = " ".join(machine["cpu_flags"])
    return (
        f"Qwen3-0.6B shape, random weights; {workload['input_tokens']} tokens in, "
        f"{workload['output_tokens']} out, greedy, end of sequence ignored, all at once; "
        f"a request may take {REQUEST_TIMEOUT_S:.0f} s. "
        f"Ready after {server.ready_after_s:.1f} s. Measured {result.started} on "
        f"{machine['cores_usable']} cores of {machine['cpu']} ({flags}), {machine['system']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, with\n\n"
        f"    {command}\n\n{rows}"
    )


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="Measure scalellm serve on the Qwen3-0.6B shape.")
    parser.add_argument("--levels", default="1,8,64", help="concurrencies; default: 1,8,64")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--serve-flags", default="", help="more flags for scalellm serve")
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "serve-qwen3-0.6b.json")
    parser.add_argument(
        "--docs",
        default=str(ROOT / "docs" / "performance.md"),
        help="or none; default: %(default)s",
    )
    options = parser.parse_args(given)
    levels = tuple(level(int(number)) for number in options.levels.split(","))
    flags = ["--dtype", options.dtype, *shlex.split(options.serve_flags)]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "qwen3-0.6b"
        make_shape.write("qwen3-0.6b", folder)
        with serving(folder, flags, Path(temporary) / "serve.log") as server:
            console.print(f"ready after {server.ready_after_s:.1f} s")
            workload = Workload(timeout_s=REQUEST_TIMEOUT_S)
            bench = Options(server.url, levels, workload, json_path=options.json)
            result = run_bench(bench, console)
    print_result(result, Console(width=120))
    if result.interrupted:
        return 130
    if options.docs != "none":
        command = shlex.join(["python", "benchmarks/serve_qwen3.py", *given])
        path = Path(options.docs)
        write_section(path, "serve-qwen3-0.6b", section(result, server, command))
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
