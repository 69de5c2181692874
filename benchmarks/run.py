"""`make bench`: docs/performance.md anew, on a machine with nothing else to do.

    make bench                                        all steps; about 50 minutes
    make bench ARGS="--steps gateways,peers --minutes 20"
    make bench ARGS="--fresh"                         forget what earlier calls measured

gateways   bench_gateway.py, twice                                                       4 minutes
fast       bench_peers.py: the fast systems, in turns, twice                             6
slow       bench_peers.py: the others, once; `timeout` at 60 s                          12
mixtral    bench_peers.py on the Mixtral shape at 1, 8, 64, once                         4
engine     bench_engine.py: start, memory, time outside kernels, gaps, prefixes         10
parallel   tensor_parallel.py: ranks, and a mixture beside a dense model of its active size  4
ablation   ablation.py before a fake engine and the real one                             3
checks     bench_accuracy.py and cross_check.py, into docs/benchmarking.md               5

A step is not begun when the minutes are over, and ends what it measures within them and a minute or
two; what it left out is measured by the next call. Peers have to be built before, once:
`python benchmarks/bench_peers.py --build-only`. How long and complete runs are made:
docs/benchmarking.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ablation
import bench_accuracy
import bench_engine
import bench_gateway
import bench_peers
import cross_check
import tensor_parallel

DOCS = Path(__file__).resolve().parent.parent / "docs"
PERFORMANCE, BENCHMARKING = DOCS / "performance.md", DOCS / "benchmarking.md"
_ACCURACY = ("--part", "delays", "--part", "direct", "--part", "stall")
_QUICK = ("--timeout", "60", "--fewest", "2")
_FAST = "scalellm-int8,openvino-best"
_SLOW = "scalellm,llama.cpp-q8_0,vllm-w8a8,transformers"
_MIXTRAL = "scalellm-int8,openvino-best,llama.cpp-q8_0,vllm-bf16,scalellm,transformers"

# Takes the seconds that are left, the flags of --fresh, and the command; gives an exit code.
Step = Callable[[float, Sequence[str], str], int]


def gateways(left_s: float, fresh: Sequence[str], command: str) -> int:
    budget = ("--budget", str(min(left_s, 240.0)))
    flags = ("--repeats", "2", "--seconds", "2", *budget, *fresh)
    return bench_gateway.main(flags, command)


def _peers(left_s: float, command: str, budget_s: float, *flags: str) -> int:
    budget = ("--budget", str(min(left_s, budget_s)))
    return bench_peers.main([*_QUICK, *budget, *flags], command)


def fast(left_s: float, fresh: Sequence[str], command: str) -> int:
    return _peers(left_s, command, 420.0, "--systems", _FAST, "--repeats", "2", *fresh)


def slow(left_s: float, _: Sequence[str], command: str) -> int:
    """After `fast`, in the same record."""
    return _peers(left_s, command, 780.0, "--systems", _SLOW, "--repeats", "1")


def mixtral(left_s: float, fresh: Sequence[str], command: str) -> int:
    flags = ("--shape", "mixtral-1b", "--levels", "1,8,64", "--systems", _MIXTRAL)
    return _peers(left_s, command, 240.0, *flags, "--repeats", "1", *fresh)


def engine(_left_s: float, _fresh: Sequence[str], _command: str) -> int:
    return bench_engine.main(["--docs", str(PERFORMANCE)])


def parallel(_left_s: float, _fresh: Sequence[str], _command: str) -> int:
    shapes = (
        ("--shape", "qwen3-0.6b"),
        ("--shape", "mixtral-1b"),
        ("--shape", "mixtral-1b-active", "--against", "mixtral-1b"),
    )
    return max(tensor_parallel.main([*shape, "--rounds", "2"]) for shape in shapes)


def parts(_left_s: float, _fresh: Sequence[str], command: str) -> int:
    docs = ["--docs", str(PERFORMANCE)]
    return max(ablation.main([*docs, "--engine", engine], command) for engine in ("fake", "demo"))


def checks(_left_s: float, _fresh: Sequence[str], command: str) -> int:
    docs = ["--docs", str(BENCHMARKING)]
    accuracy = bench_accuracy.main([*_ACCURACY, *docs])
    levels = ["--levels", "1,8", "--repeats", "2"]
    return max(accuracy, cross_check.main([*levels, *docs], command))


STEPS: Mapping[str, Step] = {
    "gateways": gateways,
    "fast": fast,
    "slow": slow,
    "mixtral": mixtral,
    "engine": engine,
    "parallel": parallel,
    "ablation": parts,
    "checks": checks,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Measure what docs/performance.md tells.")
    parser.add_argument("--steps", default=",".join(STEPS), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="in all")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    options = parser.parse_args(arguments)
    names = options.steps.split(",")
    if unknown := set(names) - STEPS.keys():
        parser.error(f"--steps: got {', '.join(sorted(unknown))}; allowed: {', '.join(STEPS)}")
    until = time.monotonic() + 60 * options.minutes
    command = " ".join(["make", "bench", *([f'ARGS="{" ".join(arguments)}"'] if arguments else [])])
    fresh = ("--fresh",) if options.fresh else ()
    failed = 0
    for name in names:
        begun = time.monotonic()
        if begun > until:
            print(f"bench: {name}: not begun, the minutes are over", file=sys.stderr)
            failed = 1
            continue
        code = STEPS[name](until - begun, fresh, command)
        print(f"bench: {name}: {time.monotonic() - begun:.0f} s, code {code}", file=sys.stderr)
        if code == 130:
            return code
        failed = max(failed, code)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
