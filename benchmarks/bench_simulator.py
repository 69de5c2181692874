"""How far simulated times are from a real deployment's, on this machine.

    python benchmarks/bench_simulator.py                all parts, then docs/performance.md
    python benchmarks/bench_simulator.py --part wide    one plan; the rest another time

For each static plan `scalellm calibrate --short` measures what steps cost; then the plan serves
closed loops and Poisson arrivals, and `scalellm simulate`'s code plays the same requests with
those costs. None of the loads is one of the calibration's. All of it is done three times, with
other requests, a calibration and a deployment of its own each time, and the medians are compared:
which prompts find a step about to begin is chance in both, and the machine's speed changes. The
load generator and the gateway run on the same two cores as the engines, which a simulation knows
only as `front_ms`.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blueprint.deployment import PLANS, calibrate, deployed, loaded, model_folder
from document import write_section

from scalellm.bench.plan import Level, Workload
from scalellm.controller.blueprint.cost import Calibration, read_calibration
from scalellm.controller.blueprint.shape import parse_groups
from scalellm.simulator.compare import Setup, run_static, summary_of
from scalellm.simulator.report import Objectives
from scalellm.simulator.requests import Closed, Load, Open

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"wide": "1 x TP 2", "narrow": "2 x TP 1"}
WIDTHS = {"wide": "2", "narrow": "1"}
# Clients that begin at the same moment would make all of a level hang on a race: how many of their
# prompts an idle engine finds when it begins its first step.
LEVELS = (
    Level(1, requests=8),
    Level(4, requests=16, ramp_s=2.0),
    Level(12, requests=36, ramp_s=5.0),
    Level(32, requests=96, ramp_s=12.0),
    Level(rate=0.5, duration_s=40.0),
    Level(rate=1.0, duration_s=40.0),
)
WARM_UP = Level(4, requests=4)
ROUNDS = 3
WITHIN = {"p50": 0.10, "p99": 0.25}
Figures = Mapping[str, float]


def figures(row: Mapping[str, Any]) -> Figures:
    """Those that are compared, of a bench's row or a simulation's summary."""
    return {
        "tok/s p50": row["output_tok_s"],
        **{
            f"{name.split('_')[0].upper()} {rank}": row[name][rank]
            for name in ("ttft_ms", "tbt_ms")
            for rank in WITHIN
        },
    }


def seed(level: int, number: int) -> int:
    """What is drawn for a level depends on it, in each round something else."""
    return level + number * len(LEVELS)


def middle(rounds: Sequence[Sequence[Figures]]) -> list[Figures]:
    """Of each level, from rounds of all levels."""
    return [
        {name: statistics.median(one[name] for one in of_level) for name in of_level[0]}
        for of_level in zip(*rounds, strict=True)
    ]


def measure(plan: str, shape: str, folder: Path, number: int) -> list[Figures]:
    """Of each level, in one round."""
    model = model_folder(shape, folder)
    log = folder / f"{plan.replace(' ', '-')}.log"
    with deployed(model, plan, 0, log) as running:
        loaded(running.url, [WARM_UP], Workload(seed=ROUNDS * len(LEVELS)))
        # One by one: a level's number decides what is drawn for it, and a simulation has but one.
        return [
            figures(loaded(running.url, [level], Workload(seed=seed(at, number))).rows[0])
            for at, level in enumerate(LEVELS)
        ]


def simulate(plan: str, calibration: Calibration, number: int) -> list[Figures]:
    """The same of a simulation."""
    (groups,) = PLANS[plan]
    blueprint = parse_groups([groups])

    def played(level: Level, drawn: int) -> Figures:
        setup = Setup(calibration, partial(_load, level, drawn), "prefix")
        summary = summary_of(plan, run_static(setup, blueprint), Objectives(1e9, 1e9))
        return figures(summary.to_json())

    return [played(level, seed(at, number)) for at, level in enumerate(LEVELS)]


def _load(level: Level, seed: int) -> Load:
    workload = Workload(seed=seed)
    if level.concurrency is None:
        return Open([(level, workload)], 1024)
    clients, requests, ramp_s = level.concurrency, level.requests, level.ramp_s
    return Closed(workload.requests, clients, requests, None, 1024, workload.seed, ramp_s)


def off(simulated: Figures, real: Figures) -> Figures:
    """How much more than measured was simulated, relatively."""
    return {name: simulated[name] / value - 1 for name, value in real.items()}


def misses(errors: Figures) -> list[str]:
    return [name for name, error in errors.items() if abs(error) > WITHIN[name.split()[-1]]]


def section(
    real: Mapping[str, list[list[Figures]]],
    calibrations: Mapping[str, list[Calibration]],
    command: str,
) -> str:
    note = next(iter(calibrations.values()))[0].note
    lines = [
        (
            "Simulated by measured, less one, after `scalellm calibrate` on the same machine "
            f"({note}); 128 tokens in, 64 out, medians of {ROUNDS} rounds. Goals: p50 and "
            f"throughput within 10%, p99 within 25%; what misses them is in bold. With\n\n"
            f"    {command}\n"
        ),
    ]
    names = list(next(iter(real.values()))[0][0])
    heads = ["plan", "load", "measured tok/s", *(name.removesuffix(" p50") for name in names[:1])]
    lines.append("| " + " | ".join([*heads, *names[1:]]) + " |")
    lines.append("|---|---|" + "---:|" * (len(names) + 1))
    for plan, rounds in real.items():
        played = [simulate(plan, found, at) for at, found in enumerate(calibrations[plan])]
        for level, measured, simulated in zip(LEVELS, middle(rounds), middle(played), strict=True):
            errors = off(simulated, measured)
            missed = misses(errors)
            cells = [
                f"**{error:+.0%}**" if name in missed else f"{error:+.0%}"
                for name, error in errors.items()
            ]
            label = f"{level.label} clients" if level.rate is None else level.label
            lines.append(
                f"| {plan} | {label} | {measured['tok/s p50']:.1f} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines) + "\n"


def _files(folder: Path, part: str, number: int) -> tuple[Path, Path]:
    """What one round of a part has measured: figures, and what steps cost."""
    return folder / f"round-{number}-{part}.json", folder / f"calibration-{number}-{part}.toml"


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/scalellm/simulator")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    options = parser.parse_args(given)
    folder = options.folder / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(ROUNDS):
        for part, plan in PARTS.items():
            file, costs = _files(folder, part, number)
            if part in (options.part or ()) or not (options.part or file.is_file()):
                calibrate(model_folder(options.shape, folder), 0, costs, WIDTHS[part])
                found = measure(plan, options.shape, folder, number)
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    files = {
        plan: [_files(folder, part, number) for number in range(ROUNDS)]
        for part, plan in PARTS.items()
    }
    if not all(file.is_file() for of_plan in files.values() for file, _ in of_plan):
        return 0
    real = {
        plan: [json.loads(file.read_text(encoding="utf-8")) for file, _ in of_plan]
        for plan, of_plan in files.items()
    }
    calibrations = {
        plan: [read_calibration(str(costs)) for _, costs in of_plan]
        for plan, of_plan in files.items()
    }
    shown = shlex.join(["python", "benchmarks/bench_simulator.py", *given])
    text = section(real, calibrations, shown)
    print(text)
    if options.docs != "none":
        write_section(Path(options.docs), "simulator", text)
    return 1 if "**" in text else 0


if __name__ == "__main__":
    sys.exit(main())
