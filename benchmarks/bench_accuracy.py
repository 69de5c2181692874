"""Measure the bench itself: does it report what is known to be true?

    python benchmarks/bench_accuracy.py            all parts, a Markdown table each
    python benchmarks/bench_accuracy.py --part delays

delays    a gateway before a fake engine of TTFT 50 ms and TBT 10 ms: reported within 2%?
direct    the same without a gateway: an endpoint of these times, nothing in between
stall     the engine stops for 2 s: do the open loop's percentiles show it?
capacity  a bare server that answers at once: what does one core of the load generator reach?

The servers are children of this script and are ended by their process ids. Nothing else may run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from document import write_section
from rich.console import Console

import scalellm.demo
from scalellm.bench.plan import Level, Workload
from scalellm.bench.results import Row
from scalellm.bench.serve import Options, run_bench
from scalellm.bench.table import notes, row_label
from scalellm.bench.target import TargetClient
from scalellm.errors import EndpointError

MODEL = Path(scalellm.demo.__file__).parent / "model"
TTFT_MS, TBT_MS = 50.0, 10.0
STALL_MS = 2000
START_S = 60.0
PARTS = ("delays", "direct", "stall", "capacity")


def spawn(code: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def running(*processes: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def gateway(**engine_settings: Any) -> Iterator[str]:
    """The URL of a gateway before a fake engine."""
    with tempfile.TemporaryDirectory() as folder:
        engine = f"unix:{folder}/engine.sock"
        vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
        settings = {
            "model": "demo",
            "model_path": str(MODEL),
            "vocab_size": vocab_size,
            "output": {"kind": "echo"},
            **engine_settings,
        }
        port = free_port()
        config = f'host = "127.0.0.1"\nport = {port}\n[[models]]\nname = "demo"\npath = "{MODEL}"\n'
        code = "import sys; from scalellm._core import {0}; {0}(*sys.argv[1:])"
        processes = [
            spawn(code.format("run_fake_engine"), engine, json.dumps(settings)),
            spawn(code.format("run_gateway"), config + f'replicas = ["{engine}"]\n'),
        ]
        with running(*processes):
            url = f"http://127.0.0.1:{port}"
            wait_ready(url)
            yield url


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(url: str) -> None:
    client, until = TargetClient(url), time.monotonic() + START_S
    while True:
        try:
            client.call("GET", "/ready")
            return
        except EndpointError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def measure(url: str, *levels: Level, **workload: Any) -> tuple[Row, ...]:
    console = Console(stderr=True)
    result = run_bench(Options(url, levels, Workload(**workload), model="demo"), console)
    for line in notes(result):
        console.print(line)
    return result.rows


def delays() -> list[str]:
    with gateway(ttft_ms=TTFT_MS, tbt_ms=TBT_MS) as url:
        return _off(url)


def direct() -> list[str]:
    port = free_port()
    code = "import sys; from scalellm._core import run_fake_endpoint as run;"
    code += "run(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))"
    with running(spawn(code, str(port), str(TTFT_MS), str(TBT_MS))):
        url = f"http://127.0.0.1:{port}"
        wait_ready(url)
        return _off(url)


def _off(url: str) -> list[str]:
    """How far what the bench says is from what was set."""
    levels = (
        Level(concurrency=1, requests=20, warmup=2),
        # 0.68 s a request: clients that begin over that time do not ask all at once, round after
        # round; a rate of 1.5 keeps about one open, 375 keep 256.
        Level(concurrency=256, requests=1024, warmup=64, ramp_s=0.68),
        Level(rate=1.5, requests=20, warmup=2),
        Level(rate=375.0, duration_s=6.0, warmup=64),
    )
    rows = measure(url, *levels, output_tokens=64)
    table = [
        "| load | TTFT ms p50 | off | TBT ms p50 | off | sends late p99 | reads late p99 | CPU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ttft, tbt = row["ttft_ms"]["p50"], row["tbt_ms"]["p50"]
        lag = row["generator"]["lag"]
        table.append(
            f"| {row_label(row)} | {ttft:.2f} | {ttft / TTFT_MS - 1:+.1%} | {tbt:.3f} "
            f"| {tbt / TBT_MS - 1:+.1%} | {lag['send_ms']['p99']:.2f} ms "
            f"| {lag['read_ms']['p99']:.2f} ms | {cpu_share(row):.0%} |"
        )
    return table


def stall() -> list[str]:
    """40 requests a second for 6 s; after 1 s of steps the engine does nothing for 2 s."""
    faults = {"hang_after_steps": 400, "hang_ms": STALL_MS}
    table = ["| load | TTFT ms p50 | p90 | p99 | max |", "|---|---:|---:|---:|---:|"]
    for level in (Level(rate=40.0, arrivals="constant", duration_s=6.0), Level(4, duration_s=6.0)):
        with gateway(ttft_ms=TTFT_MS, tbt_ms=TBT_MS, faults=faults) as url:
            (row,) = measure(url, level, output_tokens=4)
        cells = " | ".join(f"{row['ttft_ms'][name]:.0f}" for name in ("p50", "p90", "p99", "max"))
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        print(f"stall {row_label(row)}: {cells}{failed}", file=sys.stderr)
        table.append(f"| {row_label(row)}{failed} | {cells} |")
    return table


_BARE_SERVER = """
import asyncio, resource, sys
HOLD_S, TOKENS = float(sys.argv[1]), int(sys.argv[2])
token = b'data: {"choices":[{"text":" a","finish_reason":null}]}\\n\\n'
chunk = b"%x\\r\\n%b\\r\\n" % (len(token), token)
last = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\\n\\ndata: [DONE]\\n\\n'
end = b"%x\\r\\n%b\\r\\n0\\r\\n\\r\\n" % (len(last), last)
head = b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n"
head += b"transfer-encoding: chunked\\r\\n\\r\\n"
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

class Answer(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.seen = transport, b""
    def data_received(self, data):
        self.seen += data
        while (at := self.seen.find(b"\\r\\n\\r\\n")) >= 0:
            fields = self.seen[:at].lower().split(b"content-length: ")
            length = int(fields[1].split(b"\\r\\n")[0]) if len(fields) > 1 else 0
            if len(self.seen) < at + 4 + length:
                return
            self.seen = self.seen[at + 4 + length:]
            if HOLD_S:
                self.transport.write(head + chunk)
                asyncio.get_running_loop().call_later(HOLD_S, self.finish)
            else:
                self.transport.write(head + chunk * TOKENS + end)
    def finish(self):
        if not self.transport.is_closing():
            self.transport.write(chunk * (TOKENS - 1) + end)

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def capacity() -> list[str]:
    """How many requests a second, and how many open streams, one core of the generator holds."""
    table = [
        "| load | done/s | in time | sends late p50 / p99 | generator CPU | its bottleneck |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for hold_s, tokens, level in (
        (0.0, 2, Level(64, duration_s=5.0)),
        (0.0, 2, Level(rate=5000.0, duration_s=5.0)),
        (0.0, 2, Level(rate=10_000.0, duration_s=5.0)),
        (8.0, 2, Level(10_000, requests=10_000)),
    ):
        server = spawn(_BARE_SERVER, str(hold_s), str(tokens))
        with running(server):
            assert server.stdout is not None
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            (row,) = measure(url, level, input_tokens=16, output_tokens=tokens)
        lag = row["generator"]["lag"]["send_ms"]
        of_all = row["completed"] + row["failed"] + row["timed_out"]
        table.append(
            f"| {row_label(row)}, streams held {hold_s:g} s | {row['request_s']:.0f} "
            f"| {row['completed']} of {of_all} | {lag['p50']:.2f} / {lag['p99']:.2f} ms "
            f"| {cpu_share(row):.0%} | {row['generator']['bottleneck_reason'] or 'no'} |"
        )
    return table


def cpu_share(row: Row) -> float:
    """Of one core, while the level lasted."""
    return float(row["generator"]["cpu_s"] or 0.0) / float(row["duration_s"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Measure how right the bench is.")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--docs", type=Path, help="write the tables into this document")
    options = parser.parse_args(arguments)
    measures = (delays, direct, stall, capacity)
    for part, measured in zip(PARTS, measures, strict=True):
        if part in (options.part or PARTS):
            text = "\n".join(measured()) + "\n"
            print(f"\n{part}\n\n{text}", flush=True)
            if options.docs is not None:
                write_section(options.docs, f"accuracy-{part}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
