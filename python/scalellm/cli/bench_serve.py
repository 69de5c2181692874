"""`scalellm bench serve`: measures an endpoint under load."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.cli.bench_workload import add_workload, check_positive, numbers, workload_of
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.trust import add_trust, trust_of
from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from scalellm.bench.plan import Level, Workload
    from scalellm.bench.results import Result
    from scalellm.bench.slo import Slo

_FILE_WIDTH = 120
_DEFAULT_CONCURRENCIES = "1,8,64"
_MAX_RAMP_S = 3600.0
_EXIT_OK, _EXIT_FAILED_REQUESTS, _EXIT_INTERRUPTED = 0, 1, 130

_EPILOG = """\
exit code: 0 when every request completed, 1 when some failed or timed out, 2 for wrong flags,
130 after Ctrl-C (what was measured is still printed and written).

examples:
  scalellm bench serve --concurrency 1,8,64 --html report.html
  scalellm bench serve --url http://gpu:8000 --endpoint chat --rate 2,4,8 --duration 60
  scalellm bench serve --workload azure-code --rate 4 --arrivals gamma:3
  scalellm bench serve --client rate=2,cv=4,workload=azure-conversation --client rate=1,input=2000
  scalellm bench serve --slo ttft=2000,tbt=100 --find-max
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="an endpoint over HTTP, under closed-loop or open-loop load",
        description="Drives an OpenAI-compatible endpoint with load and reports what users wait.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_settings(serve, "bench")
    add_trust(serve, "bench")
    _add_load(serve)
    add_workload(serve)
    _add_objectives(serve)
    _add_output(serve)
    serve.set_defaults(bench_run=run)


def add_levels(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """What one level is: a number of clients or a rate, for how long."""
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        dest="bench_concurrency",
        metavar="N,N,...",
        help="closed loop: so many clients, each sends when its answer is there; default: 1,8,64",
    )
    load.add_argument(
        "--rate",
        dest="bench_rate",
        metavar="R,R,...",
        help="open loop: requests a second, waits counted from the scheduled send",
    )
    load.add_argument(
        "--arrivals",
        default="poisson",
        dest="bench_arrivals",
        metavar="HOW",
        help="with --rate: poisson, constant, gamma:CV, onoff:ON_S/OFF_S; default: poisson",
    )
    load.add_argument(
        "--requests",
        type=int,
        metavar="N",
        dest="bench_requests",
        help="requests of each level; default: --rounds for each client, 30 s of a rate",
    )
    load.add_argument("--rounds", type=int, default=4, metavar="N", dest="bench_rounds")
    load.add_argument(
        "--duration", type=float, metavar="S", dest="bench_duration", help="of each level"
    )
    load.add_argument(
        "--ramp",
        type=float,
        default=0.0,
        metavar="S",
        dest="bench_ramp",
        help="with --concurrency: clients begin evenly over this time; default: all at once",
    )
    return load


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = add_levels(parser)
    load.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        dest="bench_warmup",
        help="requests sent and forgotten before each level; default: one a client, at most 16",
    )
    load.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", dest="bench_timeout", help="default: 60"
    )
    load.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        dest="bench_repeat",
        help="all levels so often, in turn: three or more tell `bench compare` the spread of runs",
    )


def _add_objectives(parser: argparse.ArgumentParser) -> None:
    goals = parser.add_argument_group("objectives")
    goals.add_argument(
        "--slo",
        dest="bench_slo",
        metavar="NAME=MS,...",
        help="ttft, tbt, e2e, max_gap: counts the requests that meet them all (goodput)",
    )
    goals.add_argument(
        "--slo-share",
        type=float,
        default=0.9,
        metavar="SHARE",
        dest="bench_slo_share",
        help="of the requests that must meet them for a level to hold; default: 0.9",
    )
    goals.add_argument(
        "--find-max",
        action="store_true",
        dest="bench_find_max",
        help="search the highest rate that holds --slo; begins at the first --rate, or 1",
    )
    goals.add_argument(
        "--precision",
        type=float,
        default=0.05,
        metavar="SHARE",
        dest="bench_precision",
        help="--find-max ends when it knows the rate this well; default: 0.05",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", dest="bench_json")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", dest="bench_plot", help="writes FILE.png and FILE.svg"
    )
    output.add_argument(
        "--html", type=Path, metavar="FILE", dest="bench_html", help="one self-contained report"
    )
    output.add_argument("--quiet", action="store_true", dest="bench_quiet", help="no table")


def run(arguments: argparse.Namespace) -> int:
    settings = resolve_arguments(arguments)
    keys = settings["api_key"].value
    workload = workload_of(arguments)
    slo = _slo_of(arguments)
    levels, find_max = levels_of(arguments, workload)

    from rich.console import Console

    from scalellm.bench.serve import Options, run_bench
    from scalellm.bench.table import print_result

    _check_outputs(arguments)
    options = Options(
        url=settings["url"].value,
        levels=levels,
        workload=workload,
        model=arguments.bench_model,
        api_key=keys[0] if keys else "",
        trust=trust_of(arguments, "bench"),
        json_path=arguments.bench_json,
        slo=slo,
        find_max=find_max,
        precision=arguments.bench_precision,
    )
    result = run_bench(options, Console(stderr=True))
    if not arguments.bench_quiet:
        # Written to a file or pipe the table need not fit a screen.
        print_result(result, Console(width=None if sys.stdout.isatty() else _FILE_WIDTH))
    _write_outputs(arguments, result)
    if result.interrupted:
        return _EXIT_INTERRUPTED
    return _EXIT_FAILED_REQUESTS if result.failed or not result.completed else _EXIT_OK


def _check_outputs(arguments: argparse.Namespace) -> None:
    from scalellm.bench.plots import check_plots
    from scalellm.bench.results import check_writable

    for flag in ("json", "plot", "html"):
        path = getattr(arguments, f"bench_{flag}")
        if path is not None:
            check_writable(path, flag)
    if arguments.bench_plot or arguments.bench_html:
        check_plots()


def _write_outputs(arguments: argparse.Namespace, result: "Result") -> None:
    if arguments.bench_plot is not None:
        from scalellm.bench.plots import write_plots

        write_plots(result, arguments.bench_plot)
    if arguments.bench_html is not None:
        from scalellm.bench.report import write_report

        write_report(result, arguments.bench_html)


def levels_of(
    arguments: argparse.Namespace, workload: "Workload"
) -> "tuple[tuple[Level, ...], Level | None]":
    """The levels that the flags ask for, and the one of --find-max. Raises ConfigError."""
    from scalellm.bench.arrivals import parse_arrivals
    from scalellm.bench.plan import CLIENTS, TRACE, closed_level, open_level
    from scalellm.bench.schedule import trace_rate
    from scalellm.bench.sources import Recorded

    for flag in ("requests", "rounds", "duration", "repeat", "precision"):
        check_positive(arguments, flag)
    if (arguments.bench_warmup or 0) < 0:
        raise ConfigError(f"--warmup: got {arguments.bench_warmup}, allowed: 0 or more")
    if not 0.0 <= arguments.bench_ramp <= _MAX_RAMP_S:
        raise ConfigError(f"--ramp: got {arguments.bench_ramp:g}, allowed: 0 to {_MAX_RAMP_S:g}")
    source, arrivals = workload.requests, arguments.bench_arrivals
    parse_arrivals(arrivals)
    rates = numbers("rate", arguments.bench_rate, whole=False)
    closed_text = arguments.bench_concurrency
    amount = [arguments.bench_requests, arguments.bench_duration, arguments.bench_warmup]
    if workload.clients:
        arrivals = CLIENTS
        if not closed_text:
            rates = rates or [sum(client.rate for client in workload.clients)]
    elif isinstance(source, Recorded) and source.kind == TRACE and not closed_text:
        arrivals = TRACE
        rates = rates or [trace_rate(source.shapes, arguments.bench_trace_speed)]
        if amount[:2] == [None, None]:
            amount[0] = len(source.shapes)
    elif isinstance(source, Recorded) and amount[0] is None and amount[1] is None:
        amount[0] = len(source.shapes)
    if closed_text is None and not rates and not arguments.bench_find_max:
        closed_text = _DEFAULT_CONCURRENCIES
    requests, duration_s, warmup = amount
    closed = tuple(
        closed_level(
            int(number),
            arguments.bench_rounds,
            requests,
            duration_s,
            warmup,
            arguments.bench_ramp,
        )
        for number in numbers("concurrency", closed_text, whole=True)
    )
    if arguments.bench_find_max:
        first = open_level(rates[0] if rates else 1.0, arrivals, *amount)
        return closed * arguments.bench_repeat, first
    opened = tuple(open_level(rate, arrivals, *amount) for rate in rates)
    return (closed + opened) * arguments.bench_repeat, None


def _slo_of(arguments: argparse.Namespace) -> "Slo | None":
    from scalellm.bench.slo import parse_slo

    if arguments.bench_slo is None:
        if arguments.bench_find_max:
            raise ConfigError("--find-max: needs --slo, as --slo ttft=2000,tbt=100")
        return None
    if arguments.bench_find_max and not arguments.bench_stream:
        raise ConfigError("--find-max: needs --stream: without it there is no TTFT and no TBT")
    return parse_slo(arguments.bench_slo, arguments.bench_slo_share)
