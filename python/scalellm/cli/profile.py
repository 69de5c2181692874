"""`scalellm profile`: where the time goes between a request's first byte and its last token."""

import argparse
import sys
from pathlib import Path

from scalellm.bench.plan import ENDPOINTS, Level, Workload, closed_level, open_level
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.trust import add_trust, trust_of
from scalellm.errors import ConfigError

_FILE_WIDTH = 120
_EXIT_OK, _EXIT_FAILED_REQUESTS = 0, 1

_EPILOG = """\
A ScaleLLM endpoint tells its own stages; of any other one what can be seen from outside.
exit code: 0 when every request completed, 1 when some failed or timed out, 2 for wrong flags.

examples:
  scalellm profile --concurrency 1,64
  scalellm profile --url http://gpu:8000 --endpoint chat --rate 4 --duration 30 --trace steps.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_settings(parser, "profile")
    add_trust(parser, "profile")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        dest="profile_concurrency",
        metavar="N,N,...",
        help="closed loop: so many clients, each sends when its answer is there; default: 1,64",
    )
    load.add_argument(
        "--rate", dest="profile_rate", metavar="R,R,...", help="open loop: requests a second"
    )
    load.add_argument(
        "--requests",
        type=int,
        metavar="N",
        dest="profile_requests",
        help="of each level, at most 4096; default: --rounds for each client",
    )
    load.add_argument("--rounds", type=int, default=2, metavar="N", dest="profile_rounds")
    load.add_argument(
        "--duration", type=float, metavar="S", dest="profile_duration", help="of each level"
    )
    load.add_argument("--warmup", type=int, metavar="N", dest="profile_warmup")
    load.add_argument("--timeout", type=float, default=60.0, metavar="S", dest="profile_timeout")
    load.add_argument("--model", dest="profile_model", help="default: the first that is named")
    load.add_argument(
        "--endpoint", choices=ENDPOINTS, default="completions", dest="profile_endpoint"
    )
    load.add_argument(
        "--input-tokens", type=int, default=128, metavar="N", dest="profile_input_tokens"
    )
    load.add_argument(
        "--output-tokens", type=int, default=64, metavar="N", dest="profile_output_tokens"
    )
    load.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        dest="profile_baseline",
        help="of a foreign endpoint: also measure ScaleLLM's front alone",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", dest="profile_json")
    output.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        dest="profile_trace",
        help="requests and steps for chrome://tracing or ui.perfetto.dev",
    )
    output.add_argument(
        "--otlp",
        metavar="URL",
        dest="profile_otlp",
        help="OpenTelemetry collector that spans are posted to, e.g. http://localhost:4318",
    )
    output.add_argument(
        "--all-stages", action="store_true", dest="profile_all", help="also those below 0.2%%"
    )
    output.add_argument("--quiet", action="store_true", dest="profile_quiet", help="no tables")


def run(arguments: argparse.Namespace) -> int:
    settings = resolve_arguments(arguments)
    keys, admin_keys = settings["api_key"].value, settings["admin_key"].value
    levels, workload = levels_of(arguments), workload_of(arguments)

    from rich.console import Console

    from scalellm.bench.profile import ProfileOptions, run_profile
    from scalellm.bench.profile_otlp import export
    from scalellm.bench.profile_table import print_profile
    from scalellm.bench.profile_trace import write_trace
    from scalellm.bench.results import check_writable
    from scalellm.bench.target import TargetClient

    for path in (arguments.profile_json, arguments.profile_trace):
        if path is not None:
            check_writable(path)
    trust = trust_of(arguments, "profile")
    options = ProfileOptions(
        url=settings["url"].value,
        levels=levels,
        workload=workload,
        model=arguments.profile_model,
        api_key=keys[0] if keys else "",
        admin_key=admin_keys[0] if admin_keys else "",
        trust=trust,
        baseline=arguments.profile_baseline,
    )
    collector = None
    if arguments.profile_otlp is not None:
        collector = TargetClient(arguments.profile_otlp, trust=trust, flag="--otlp")
    profile = run_profile(options, Console(stderr=True))
    if arguments.profile_json is not None:
        profile.write(arguments.profile_json)
    if arguments.profile_trace is not None:
        write_trace(profile, arguments.profile_trace)
    if not arguments.profile_quiet:
        console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
        print_profile(profile, console, arguments.profile_all)
    if collector is not None:
        number = export(profile, collector)
        print(f"{number} spans posted to {collector.url}", file=sys.stderr)
    return _EXIT_FAILED_REQUESTS if profile.failed or not profile.measured else _EXIT_OK


def levels_of(arguments: argparse.Namespace) -> tuple[Level, ...]:
    """The levels that the flags ask for. Raises ConfigError, naming the flag."""
    for flag in ("requests", "rounds", "duration", "timeout", "input_tokens", "output_tokens"):
        value = getattr(arguments, f"profile_{flag}")
        if value is not None and value <= 0:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name}: got {value}, allowed: more than 0")
    if (arguments.profile_warmup or 0) < 0:
        raise ConfigError(f"--warmup: got {arguments.profile_warmup}, allowed: 0 or more")
    amount = (arguments.profile_requests, arguments.profile_duration, arguments.profile_warmup)
    text = arguments.profile_concurrency
    if text is None and arguments.profile_rate is None:
        text = "1,64"
    closed = tuple(
        closed_level(round(number), arguments.profile_rounds, *amount)
        for number in _numbers("concurrency", text, whole=True)
    )
    return closed + tuple(
        open_level(rate, "poisson", *amount)
        for rate in _numbers("rate", arguments.profile_rate, whole=False)
    )


def workload_of(arguments: argparse.Namespace) -> Workload:
    return Workload(
        endpoint=arguments.profile_endpoint,
        input_tokens=arguments.profile_input_tokens,
        output_tokens=arguments.profile_output_tokens,
        timeout_s=arguments.profile_timeout,
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
