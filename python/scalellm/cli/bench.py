"""`scalellm bench serve`: measures an endpoint under load."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scalellm.bench.plan import ARRIVALS, ENDPOINTS, Level, Workload, closed_level, open_level
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.errors import ConfigError

_FILE_WIDTH = 120
_EXIT_OK, _EXIT_FAILED_REQUESTS, _EXIT_INTERRUPTED = 0, 1, 130

_EPILOG = """\
exit code: 0 when every request completed, 1 when some failed or timed out, 2 for wrong flags,
130 after Ctrl-C (what was measured is still printed and written).

examples:
  scalellm bench serve --concurrency 1,8,64
  scalellm bench serve --url http://gpu:8000 --endpoint chat --rate 2,4,8 --duration 60
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    serve = commands.add_parser(
        "serve",
        help="an endpoint over HTTP, under closed-loop or open-loop load",
        description="Drives an OpenAI-compatible endpoint with load and reports what users wait.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_settings(serve, "bench")
    _add_load(serve)
    _add_workload(serve)
    serve.add_argument("--json", type=Path, metavar="FILE", dest="bench_json")
    serve.add_argument("--quiet", action="store_true", dest="bench_quiet", help="no table")


def _add_load(parser: argparse.ArgumentParser) -> None:
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
        "--arrivals", choices=ARRIVALS, default="poisson", dest="bench_arrivals", help="with --rate"
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
        "--warmup",
        type=int,
        metavar="N",
        dest="bench_warmup",
        help="requests sent and forgotten before each level; default: one a client, at most 16",
    )
    load.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", dest="bench_timeout", help="default: 60"
    )


def _add_workload(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("workload")
    work.add_argument("--model", dest="bench_model", help="default: the first the endpoint names")
    work.add_argument("--endpoint", choices=ENDPOINTS, default="completions", dest="bench_endpoint")
    work.add_argument(
        "--input-tokens", type=int, default=128, metavar="N", dest="bench_input_tokens"
    )
    work.add_argument(
        "--output-tokens", type=int, default=64, metavar="N", dest="bench_output_tokens"
    )
    work.add_argument("--temperature", type=float, default=0.0, dest="bench_temperature")
    work.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        dest="bench_ignore_eos",
        help="answers of the full length, whatever the model says",
    )
    work.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, dest="bench_stream"
    )
    work.add_argument(
        "--extra-body", metavar="JSON", dest="bench_extra_body", help="more fields of the request"
    )
    work.add_argument("--seed", type=int, default=0, dest="bench_seed", help="of prompts and times")
    work.add_argument(
        "--gaps", action="store_true", dest="bench_gaps", help="keep every gap in the JSON"
    )


def run(arguments: argparse.Namespace) -> int:
    settings = resolve_arguments(arguments)
    keys = settings["api_key"].value
    levels, workload = levels_of(arguments), workload_of(arguments)

    from rich.console import Console

    from scalellm.bench.results import check_writable
    from scalellm.bench.serve import Options, run_bench
    from scalellm.bench.table import print_result

    if arguments.bench_json is not None:
        check_writable(arguments.bench_json)
    options = Options(
        url=settings["url"].value,
        levels=levels,
        workload=workload,
        model=arguments.bench_model,
        api_key=keys[0] if keys else "",
        json_path=arguments.bench_json,
    )
    result = run_bench(options, Console(stderr=True))
    if not arguments.bench_quiet:
        # Written to a file or pipe the table need not fit a screen.
        print_result(result, Console(width=None if sys.stdout.isatty() else _FILE_WIDTH))
    if result.interrupted:
        return _EXIT_INTERRUPTED
    return _EXIT_FAILED_REQUESTS if result.failed or not result.completed else _EXIT_OK


def levels_of(arguments: argparse.Namespace) -> tuple[Level, ...]:
    """The levels that the flags ask for. Raises ConfigError, naming the flag."""
    for flag in ("requests", "rounds", "duration"):
        value = getattr(arguments, f"bench_{flag}")
        if value is not None and value <= 0:
            raise ConfigError(f"--{flag}: got {value}, allowed: more than 0")
    if (arguments.bench_warmup or 0) < 0:
        raise ConfigError(f"--warmup: got {arguments.bench_warmup}, allowed: 0 or more")
    amount = (arguments.bench_requests, arguments.bench_duration, arguments.bench_warmup)
    text = arguments.bench_concurrency
    if text is None and arguments.bench_rate is None:
        text = "1,8,64"
    closed = tuple(
        closed_level(int(number), arguments.bench_rounds, *amount)
        for number in _numbers("concurrency", text, whole=True)
    )
    return closed + tuple(
        open_level(rate, arguments.bench_arrivals, *amount)
        for rate in _numbers("rate", arguments.bench_rate, whole=False)
    )


def workload_of(arguments: argparse.Namespace) -> Workload:
    for flag in ("input_tokens", "output_tokens", "timeout"):
        value = getattr(arguments, f"bench_{flag}")
        if value <= 0:
            raise ConfigError(f"--{flag.replace('_', '-')}: got {value}, allowed: more than 0")
    if arguments.bench_seed < 0:
        raise ConfigError(f"--seed: got {arguments.bench_seed}, allowed: 0 or more")
    return Workload(
        endpoint=arguments.bench_endpoint,
        input_tokens=arguments.bench_input_tokens,
        output_tokens=arguments.bench_output_tokens,
        stream=arguments.bench_stream,
        ignore_eos=arguments.bench_ignore_eos,
        temperature=arguments.bench_temperature,
        timeout_s=arguments.bench_timeout,
        seed=arguments.bench_seed,
        record_gaps=arguments.bench_gaps,
        extra_body=_json_object(arguments.bench_extra_body),
    )


def _numbers(flag: str, text: str | None, whole: bool) -> list[float]:
    if text is None:
        return []
    try:
        found = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") for number in found):
        kind = "whole numbers" if whole else "numbers"
        raise ConfigError(f"--{flag}: got {text!r}, allowed: {kind} over 0 with commas between")
    return [float(number) for number in found]


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"--extra-body: got {text!r}, allowed: a JSON object")
    return found
