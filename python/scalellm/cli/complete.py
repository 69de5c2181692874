"""`scalellm complete PROMPT`: continues one prompt; `-` reads it from standard input."""

import argparse
import sys

from scalellm.cli.answer import add_sampling, endpoint_of, request_fields, show
from scalellm.cli.flags import add_settings, resolve_arguments

_EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - for stdin")
    add_settings(parser, "complete")
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    endpoint = endpoint_of(resolve_arguments(arguments))
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    body = {**request_fields(arguments, endpoint), "prompt": prompt}
    answer = show(endpoint.stream("/v1/completions", body))
    print()
    if sys.stderr.isatty():
        print(f"({answer.speed()})", file=sys.stderr)
    return _EXIT_INTERRUPTED if answer.interrupted else 0
