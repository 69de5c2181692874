"""The flags that say what the requests of `scalellm bench serve` are like."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from scalellm.bench.lengths import Lengths
    from scalellm.bench.plan import Client, Workload
    from scalellm.bench.sources import Source

_ENDPOINTS = ("chat", "completions")
_NAMED = ("azure-conversation", "azure-code", "mooncake")
_WORKLOADS = ("lengths", "conversations", *_NAMED)
_CLIENT_FIELDS = "rate=R, and: name, cv, arrivals, workload, input, output, reuse"


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Everything that requests to an endpoint have."""
    asked = parser.add_argument_group("endpoint")
    asked.add_argument("--model", dest="bench_model", help="default: the first the endpoint names")
    asked.add_argument(
        "--endpoint", choices=_ENDPOINTS, default="completions", dest="bench_endpoint"
    )
    add_shapes(parser)
    _add_prompt_file(parser)
    _add_fields(parser)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Lengths, shared beginnings and turns: what a simulation knows of a request."""
    work = parser.add_argument_group("workload")
    work.add_argument(
        "--workload",
        choices=_WORKLOADS,
        default="lengths",
        dest="bench_workload",
        help="lengths: by the flags below; conversations: of several turns; or a public trace's",
    )
    work.add_argument(
        "--input-tokens", type=int, default=128, metavar="N", dest="bench_input_tokens"
    )
    work.add_argument(
        "--output-tokens", type=int, default=64, metavar="N", dest="bench_output_tokens"
    )
    for what in ("input", "output"):
        work.add_argument(
            f"--{what}-lognormal",
            metavar="MU/SIGMA",
            dest=f"bench_{what}_lognormal",
            help=f"instead of --{what}-tokens, e.g. 6.63/0.99",
        )
    work.add_argument(
        "--length-scale",
        type=float,
        default=1.0,
        metavar="F",
        dest="bench_length_scale",
        help="all lengths of distributions and traces times F",
    )
    work.add_argument(
        "--max-input-tokens", type=int, metavar="N", dest="bench_max_input_tokens", help="cut there"
    )
    work.add_argument(
        "--prefix-reuse",
        type=float,
        metavar="SHARE",
        dest="bench_prefix_reuse",
        help="of the prompts' tokens that repeat an earlier prompt's beginning; mooncake: 0.5",
    )
    work.add_argument("--seed", type=int, default=0, dest="bench_seed", help="of prompts and times")
    _add_conversations(parser)
    _add_files(parser)


def _add_conversations(parser: argparse.ArgumentParser) -> None:
    talk = parser.add_argument_group("conversations")
    talk.add_argument("--turns", type=int, default=4, metavar="N", dest="bench_turns")
    talk.add_argument(
        "--systems", type=int, default=4, metavar="N", dest="bench_systems", help="system prompts"
    )
    talk.add_argument(
        "--system-tokens", type=int, default=256, metavar="N", dest="bench_system_tokens"
    )
    talk.add_argument(
        "--think",
        type=float,
        default=0.0,
        metavar="S",
        dest="bench_think",
        help="mean time from an answer to the next turn (exponential); default: 0",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files and clients")
    files.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        dest="bench_trace",
        help="JSONL or CSV as of Mooncake, Azure or BurstGPT: its times, lengths and prefixes",
    )
    files.add_argument(
        "--trace-speed", type=float, default=1.0, metavar="F", dest="bench_trace_speed"
    )
    files.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        dest="bench_client",
        help=f"one kind of user of several whose sum is the load; {_CLIENT_FIELDS}",
    )


def _add_prompt_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        dest="bench_prompt_file",
        help="real prompts: JSONL with prompt, text or messages; else one a line",
    )


def _add_fields(parser: argparse.ArgumentParser) -> None:
    fields = parser.add_argument_group("requests")
    fields.add_argument("--temperature", type=float, default=0.0, dest="bench_temperature")
    fields.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        dest="bench_ignore_eos",
        help="answers of the full length, whatever the model says",
    )
    fields.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, dest="bench_stream"
    )
    fields.add_argument(
        "--extra-body", metavar="JSON", dest="bench_extra_body", help="more fields of the request"
    )
    fields.add_argument(
        "--gaps", action="store_true", dest="bench_gaps", help="keep every gap in the JSON"
    )


def workload_of(arguments: argparse.Namespace) -> "Workload":
    """What the flags ask for. Raises ConfigError, naming the flag."""
    from scalellm.bench.plan import Workload

    names = ("input_tokens", "output_tokens", "timeout", "length_scale", "max_input_tokens")
    for flag in (*names, "turns", "systems", "trace_speed"):
        check_positive(arguments, flag)
    for flag in ("seed", "system_tokens", "think", "temperature"):
        value = getattr(arguments, f"bench_{flag}")
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{flag.replace('_', '-')}: got {value}, allowed: 0 or more")
    clients = tuple(
        _client(arguments, number, text) for number, text in enumerate(arguments.bench_client, 1)
    )
    sources = {
        "--trace": arguments.bench_trace,
        "--prompt-file": arguments.bench_prompt_file,
        "--client": clients,
        "--workload": arguments.bench_workload != "lengths",
    }
    given = [flag for flag, value in sources.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: allowed is one of them")
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
        source=None if clients else _source(arguments),
        clients=clients,
    )


def _source(arguments: argparse.Namespace) -> "Source | None":
    """None: fixed lengths, which are kept exactly."""
    from scalellm.bench.traces import read_prompts, read_trace

    if arguments.bench_trace is not None:
        return read_trace(arguments.bench_trace, arguments.bench_length_scale)
    if arguments.bench_prompt_file is not None:
        output_tokens = arguments.bench_output_tokens
        return read_prompts(arguments.bench_prompt_file, arguments.bench_endpoint, output_tokens)
    lognormal = arguments.bench_input_lognormal or arguments.bench_output_lognormal
    if arguments.bench_workload == "lengths" and not lognormal and not _reuse(arguments):
        return None
    return _synthetic(arguments, arguments.bench_workload, _reuse(arguments))


def _synthetic(arguments: argparse.Namespace, name: str, reuse: float | None) -> "Source":
    from scalellm.bench.lengths import PRESETS, LogNormal
    from scalellm.bench.sources import Conversations, Synthetic

    scale, at_most = arguments.bench_length_scale, arguments.bench_max_input_tokens
    if name in PRESETS:
        preset = PRESETS[name]
        return Synthetic(
            LogNormal(*preset.input, scale, at_most),
            LogNormal(*preset.output, scale),
            preset.prefix_reuse if reuse is None else reuse,
            name,
        )
    inputs = _lengths(arguments, "input", at_most)
    outputs = _lengths(arguments, "output", None)
    if name == "conversations":
        return Conversations(
            inputs,
            outputs,
            arguments.bench_turns,
            arguments.bench_systems,
            arguments.bench_system_tokens,
            arguments.bench_think,
        )
    return Synthetic(inputs, outputs, reuse or 0.0, name)


def _lengths(arguments: argparse.Namespace, what: str, at_most: int | None) -> "Lengths":
    from scalellm.bench.lengths import Fixed, parse_lognormal

    text = getattr(arguments, f"bench_{what}_lognormal")
    if text is None:
        return Fixed(getattr(arguments, f"bench_{what}_tokens"))
    return parse_lognormal(f"{what}-lognormal", text, arguments.bench_length_scale, at_most)


def _reuse(arguments: argparse.Namespace) -> float | None:
    share: float | None = arguments.bench_prefix_reuse
    if share is not None and not 0 <= share < 1:
        raise ConfigError(f"--prefix-reuse: got {share}, allowed: 0 to below 1")
    return share


def _client(arguments: argparse.Namespace, number: int, text: str) -> "Client":
    """Read `rate=2,cv=4,workload=azure-code`; what is not said is as the other flags say."""
    from scalellm.bench.arrivals import parse_arrivals
    from scalellm.bench.plan import Client

    pairs = [part.partition("=") for part in text.split(",")]
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    own = argparse.Namespace(**vars(arguments))
    try:
        rate = float(fields.pop("rate"))
        name = fields.pop("name", f"client-{number}")
        arrivals = fields.pop("arrivals", arguments.bench_arrivals)
        if "cv" in fields:
            arrivals = f"gamma:{fields.pop('cv')}"
        own.bench_workload = fields.pop("workload", "lengths")
        for what in ("input", "output"):
            length = fields.pop(what, None)
            if length is not None:
                kind = "lognormal" if "/" in length else "tokens"
                value: Any = length if "/" in length else int(length)
                setattr(own, f"bench_{what}_{kind}", value)
                check_positive(own, f"{what}_tokens")
        own.bench_prefix_reuse = float(fields.pop("reuse", arguments.bench_prefix_reuse or 0.0))
    except (KeyError, ValueError):
        rate, name, arrivals = -1.0, "", "poisson"
    if fields or not 0 < rate < 1e6 or own.bench_workload not in _WORKLOADS:
        raise ConfigError(f"--client: got {text!r}, allowed: {_CLIENT_FIELDS}")
    parse_arrivals(arrivals)
    reuse = _reuse(own) or None
    return Client(name, rate, arrivals, _synthetic(own, own.bench_workload, reuse))


def check_positive(arguments: argparse.Namespace, flag: str) -> None:
    value = getattr(arguments, f"bench_{flag}")
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"--{flag.replace('_', '-')}: got {value}, allowed: more than 0")


def numbers(flag: str, text: str | None, whole: bool) -> list[float]:
    """Read `1,8,64`. Raises ConfigError with what is allowed."""
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
