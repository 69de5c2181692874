"""`scalellm simulate`: plans and the policy under a load, in simulated time."""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalellm.cli.bench_serve import add_levels, levels_of
from scalellm.cli.bench_workload import add_shapes, workload_of
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.table import table
from scalellm.config import BlueprintConfig, build
from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from scalellm.bench.plan import Level, Workload
    from scalellm.controller.blueprint.cost import Calibration
    from scalellm.controller.blueprint.shape import Blueprint
    from scalellm.simulator.cluster import Run
    from scalellm.simulator.compare import Setup
    from scalellm.simulator.report import Summary

_EXIT_DIFFERENT = 1
_CALIBRATION = "node-8gpu"
_HOURS = 24
_DAY_SWING = 0.8  # of the mean rate, up at midday and down at night
_DAY_WINDOW_S = 30.0
# What `bench` asks of an endpoint and a simulation does not.
_NO_ENDPOINT: dict[str, Any] = {
    "bench_model": None,
    "bench_endpoint": "completions",
    "bench_temperature": 0.0,
    "bench_ignore_eos": True,
    "bench_stream": True,
    "bench_extra_body": None,
    "bench_gaps": False,
    "bench_prompt_file": None,
    "bench_timeout": 60.0,
    "bench_warmup": 0,
    "bench_repeat": 1,
    "bench_precision": 0.05,
    "bench_find_max": False,
}
_EPILOG = """\
The scheduler, the KV cache, the routing and the policy are the code that serves; only a step's time
comes from the calibration. Every static plan of one width is run beside `auto`.

examples:
  scalellm simulate --concurrency 1,64,512
  scalellm simulate --workload azure-conversation --rate 40 --duration 120 --objective slo
  scalellm simulate --workload azure-code --rate 100 --day --plot day.svg --json day.json
  scalellm simulate --replica tp=4,count=1 --replica tp=1,count=4 --calibration mine.toml --rate 2
  scalellm simulate --rate 60 --journal decisions.jsonl
  scalellm simulate --replay decisions.jsonl       # exit code 1 if one would be taken differently
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_settings(parser, "simulate")
    load = add_levels(parser)
    load.add_argument(
        "--day",
        action="store_true",
        help=f"{_HOURS} windows of --duration (default {_DAY_WINDOW_S:g} s) around --rate, one for "
        f"each hour: up to {1 + _DAY_SWING:g} times as much by day, {1 - _DAY_SWING:g} by night",
    )
    add_shapes(parser)
    what = parser.add_argument_group("simulation")
    what.add_argument(
        "--routing",
        choices=("least-load", "prefix", "shape", "session"),
        default="least-load",
        help="the gateway's policy; default: %(default)s",
    )
    what.add_argument(
        "--only", choices=("auto", "static"), help="leave the static plans, or `auto`, out"
    )
    what.add_argument(
        "--exact", action="store_true", help="compute every step by itself, none in closed form"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE")
    output.add_argument("--plot", type=Path, metavar="FILE", help=".svg or .png")
    output.add_argument(
        "--replay",
        dest="replayed",  # `replay` is a setting, of what becomes of a lost replica's requests
        type=Path,
        metavar="FILE",
        help="takes the decisions of a journal again",
    )
    parser.set_defaults(**_NO_ENDPOINT)


def run(arguments: argparse.Namespace) -> int:
    if arguments.replayed is not None:
        return _replay(arguments.replayed)
    config = build(BlueprintConfig, resolve_arguments(arguments))
    _check_outputs(arguments, config.journal_file)

    from scalellm.controller.blueprint.cost import read_calibration
    from scalellm.simulator.report import HEAD, cells, document, write_json

    calibration = read_calibration(config.calibration or _CALIBRATION)
    devices = config.devices or max(calibration.widths)
    plans = _plans(config, calibration, devices)
    print(f"{calibration.name}: {calibration.note} ({calibration.source}); {devices} devices")
    summaries: list[Summary] = []
    runs: list[Run] = []
    for label, setup in _setups(arguments, calibration):
        began_s = time.perf_counter()
        found = _compare(arguments, setup, plans, config)
        took_s = time.perf_counter() - began_s
        print(f"\n{label}, simulated in {took_s:.1f} s")
        print("\n".join(table([list(HEAD), *(cells(one) for one, _ in found)])))
        _say_best([one for one, _ in found])
        summaries += [one for one, _ in found]
        runs += [ran for _, ran in found]
    if arguments.json is not None:
        facts = {"calibration": calibration.name, "source": calibration.source, "devices": devices}
        write_json(document(summaries, runs, facts), arguments.json)
    if arguments.plot is not None:
        from scalellm.simulator.plots import write_plot

        write_plot([one.plan for one in summaries], runs, arguments.plot)
    return 0


def _check_outputs(arguments: argparse.Namespace, journal: Path | None) -> None:
    from scalellm.bench.results import check_writable

    for flag, path in (
        ("json", arguments.json),
        ("plot", arguments.plot),
        ("journal", journal),
    ):
        if path is not None:
            check_writable(path, flag)
    if arguments.plot is not None:
        from scalellm.bench.plots import check_plots

        check_plots()
        if arguments.plot.suffix not in (".svg", ".png"):
            raise ConfigError(f"--plot: got {arguments.plot.name!r}, allowed: .svg or .png")


def _plans(
    config: BlueprintConfig, calibration: "Calibration", devices: int
) -> "tuple[Blueprint, ...]":
    """The static plans: the one that was asked for, or all of one width."""
    from scalellm.controller.blueprint.shape import check_fits, parse_groups, uniform

    plans = uniform(calibration.widths, devices)
    if not plans:
        narrowest = min(calibration.widths)
        raise ConfigError(f"--devices: got {devices}, allowed: {narrowest} or more")
    if config.replica:
        asked = parse_groups(config.replica)
        check_fits(asked, devices, calibration.widths, "--replica")
        plans = (*(plan for plan in plans if plan != asked), asked)
    return plans


def _setups(arguments: argparse.Namespace, calibration: "Calibration") -> "list[tuple[str, Setup]]":
    from scalellm.simulator.compare import Setup

    workload = workload_of(arguments)
    levels, _ = levels_of(arguments, workload)
    if arguments.day and (len(levels) != 1 or levels[0].rate is None):
        raise ConfigError("--day: needs one --rate, the day's mean")
    max_tokens = min(shape.max_model_len for shape in calibration.shapes.values())
    found = []
    for level in levels:
        label = f"{level.label} at once" if level.rate is None else f"{level.label}"
        if arguments.day:
            label += " on average, a day"
        setup = Setup(
            calibration,
            _Load(level, workload, arguments.day, max_tokens),
            arguments.routing,
            arguments.exact,
        )
        found.append((label, setup))
    return found


class _Load:
    """Makes the load of one level, the same each time."""

    def __init__(self, level: "Level", workload: "Workload", day: bool, max_tokens: int) -> None:
        self._level = level
        self._workload = workload
        self._day = day
        self._max_tokens = max_tokens

    def __call__(self) -> Any:
        from scalellm.simulator.requests import Closed, Open

        level, workload = self._level, self._workload
        if level.concurrency is not None:
            return Closed(
                workload.requests,
                level.concurrency,
                level.requests,
                level.duration_s,
                self._max_tokens,
                workload.seed,
                level.ramp_s,
            )
        levels = day(level) if self._day else [level]
        return Open([(one, workload) for one in levels], self._max_tokens)


def day(level: "Level") -> "list[Level]":
    """A level for each hour, of the same length; the mean of their rates is the level's."""
    rate = level.rate or 0.0
    swing = [1 - _DAY_SWING * math.cos(2 * math.pi * (h + 0.5) / _HOURS) for h in range(_HOURS)]
    return [replace(level, rate=rate * factor) for factor in swing]


def _compare(
    arguments: argparse.Namespace,
    setup: "Setup",
    plans: "tuple[Blueprint, ...]",
    config: BlueprintConfig,
) -> "list[tuple[Summary, Run]]":
    from scalellm.controller.shapes import policy_settings
    from scalellm.simulator.compare import AUTO, run_auto, run_static, summary_of
    from scalellm.simulator.report import Objectives

    objectives = Objectives(config.slo_ttft_ms, config.slo_tbt_ms)
    found = []
    if arguments.only != "auto":
        for plan in plans:
            ran = run_static(setup, plan)
            found.append((summary_of(str(plan), ran, objectives), ran[0]))
    if arguments.only != "static":
        settings = policy_settings(config)
        ran = run_auto(setup, plans, plans[-1], settings, config.journal_file)
        found.append((summary_of(AUTO, ran, objectives), ran[0]))
    return found


def _say_best(summaries: "list[Summary]") -> None:
    from scalellm.simulator.compare import AUTO, best

    static = [one for one in summaries if one.plan != AUTO]
    if not static:
        return
    found = best(static)
    print(f"best static plan: {found.plan}, goodput {found.goodput_request_s:.2f}/s", end="")
    auto = next((one for one in summaries if one.plan == AUTO), None)
    if auto is not None and found.goodput_request_s > 0:
        print(f"; auto has {auto.goodput_request_s / found.goodput_request_s:.2f} of it", end="")
    print()


def _replay(path: Path) -> int:
    """Take a journal's decisions again; 1 if any comes out differently."""
    from scalellm.controller.blueprint.journal import replay

    taken = switched = different = 0
    for signals, told, decision in replay(path):
        taken += 1
        if decision.switch:
            switched += 1
            print(
                f"{signals.now_s:10.1f} s  {signals.running} running, {signals.waiting} waiting, "
                f"{signals.arrivals_s:.1f}/s: {signals.blueprint} -> {decision.blueprint}; "
                f"{decision.reason}"
            )
        if told != decision.to_json():
            different += 1
            print(f"{signals.now_s:10.1f} s  differs: was {told}", file=sys.stderr)
    print(f"{taken} decisions, {switched} switches, {different} taken differently")
    return _EXIT_DIFFERENT if different else 0
