"""Time steps of one process and of several ranks on the same cores, in turns, and write them down.

    python benchmarks/tensor_parallel.py                     int8, 2 threads: 1 process and 2 ranks
    python benchmarks/tensor_parallel.py --docs none         leaves docs/performance.md alone
    python benchmarks/tensor_parallel.py --shape mixtral-1b  and with experts divided whole
    python benchmarks/tensor_parallel.py --shape mixtral-1b-active --against mixtral-1b
                                                             a mixture beside a dense model that
                                                             computes as much, one process each

A decode step of N streams has 160 tokens of context each, in blocks of their own; a prompt has 128
tokens. Steps are greedy and recorded. Each configuration is loaded anew in every round, a process
of its own, so that a busy machine disturbs all alike; figures are medians of all rounds.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import make_shape
from document import write_section

from scalellm.bench.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, PROMPT, BLOCK = 160, 128, 16
# What is timed -> how often in a round.
REPEATS = {"decode of 1": 40, "decode of 8": 24, "decode of 64": 10, "prompt of 128": 8}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a replica uses the cores."""

    shape: str
    ranks: int = 1
    whole_experts: bool = False

    @property
    def name(self) -> str:
        if self.ranks == 1:
            return f"{self.shape}, 1 process"
        return f"{self.ranks} ranks" + (", whole experts" if self.whole_experts else "")

    @property
    def arguments(self) -> list[str]:
        return [f"--ranks={self.ranks}", *(["--whole-experts"] if self.whole_experts else [])]


def measure(folder: Path, layout: Layout, threads: int, quantization: str) -> None:
    """Print, as JSON, [milliseconds of a step, of it exchange] by what was timed."""
    from scalellm.config import EngineConfig
    from scalellm.executor.batch import Batch, Span
    from scalellm.executor.load import load_executor

    config = EngineConfig(
        model_path=folder,
        load_format="dummy",
        device="cpu",
        dtype="bfloat16",
        quantization=quantization,
        tensor_parallel_size=layout.ranks,
        enable_expert_parallel=layout.whole_experts,
        cpu_threads=threads,
        max_model_len=512,
        kv_cache_memory_bytes=2 << 30,
        compute_nice=0,
    )
    executor = load_executor(config)
    blocks = CONTEXT // BLOCK + 1

    def batch_of(what: str) -> Batch:
        count = int(what.split()[-1])
        if what.startswith("prompt"):
            return Batch((Span(range(count), 0, range(blocks), 1),))
        tables = [range(i * blocks, (i + 1) * blocks) for i in range(count)]
        return Batch(tuple(Span((i,), CONTEXT, table, 1) for i, table in enumerate(tables)))

    found: dict[str, list[tuple[float, float]]] = {}
    try:
        for what, repeats in REPEATS.items():
            batch, times = batch_of(what), []
            for _ in range(repeats + 2):
                executor.greedy(batch)
                by_kind = executor.last_forward_ms
                times.append((sum(by_kind.values()), by_kind["exchange"]))
            found[what] = times[2:]
    finally:
        executor.close()
    print(json.dumps(found))


def table(times: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> str:
    """Rows of what was timed, columns of layouts."""
    first = next(iter(times))
    lines = ["| ms | " + " | ".join(times) + " |", "|---" * (len(times) + 1) + "|"]
    for what in REPEATS:
        cells = []
        for name, found in times.items():
            step_ms = statistics.median(step for step, _ in found[what])
            cell = f"{step_ms:.1f}"
            if name != first and "process" in name:
                one = statistics.median(step for step, _ in times[first][what])
                cell += f" ({step_ms / one:.2f} x)"
            elif name != first:
                exchange_ms = statistics.median(exchange for _, exchange in found[what])
                one = statistics.median(step for step, _ in times[first][what])
                cell += f" ({step_ms / one:.2f} x; {exchange_ms:.1f} waiting and adding)"
            cells.append(cell)
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=make_shape.SHAPES, default="qwen3-0.6b")
    parser.add_argument("--against", choices=make_shape.SHAPES, help="in place of ranks")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--whole-experts", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.folder is not None:
        layout = Layout(given.shape, given.ranks, given.whole_experts)
        measure(given.folder, layout, given.threads, given.quantization)
        return 0
    layouts = [Layout(given.shape)]
    if given.against is not None:
        layouts.append(Layout(given.against))
    else:
        layouts.append(Layout(given.shape, given.threads))
        if "num_local_experts" in make_shape.SHAPES[given.shape]:
            layouts.append(Layout(given.shape, given.threads, whole_experts=True))
    times: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in {layout.shape for layout in layouts}:
            make_shape.write(shape, Path(folder) / shape)
        for _ in range(given.rounds):
            for layout in layouts:
                at = Path(folder) / layout.shape
                command = [sys.executable, __file__, f"--folder={at}", *layout.arguments]
                command += [f"--threads={given.threads}", f"--quantization={given.quantization}"]
                ran = subprocess.run(command, check=True, capture_output=True, text=True)
                for what, found in json.loads(ran.stdout.splitlines()[-1]).items():
                    times.setdefault(layout.name, {}).setdefault(what, []).extend(found)
    text = table(times)
    print(text)
    if given.docs != "none":
        shown = shlex.join(["python", "benchmarks/tensor_parallel.py", *arguments])
        machine = describe_machine()
        heading = (
            f"{given.shape} shape, random weights, {given.quantization}, {given.threads} threads "
            f"in all, on {machine['cores']} cores of {machine['cpu']}:\n\n    {shown}\n\n"
        )
        name = "tensor parallel" if given.against is None else f"beside {given.against}"
        write_section(Path(given.docs), f"{name}, {given.shape}", heading + text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
