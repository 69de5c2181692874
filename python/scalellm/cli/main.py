"""`scalellm COMMAND ...`: finds the command's module and runs it.

Only the chosen command's module is imported, so that `scalellm --help` stays instant. A command
is a module `scalellm.cli.NAME` with

    add_arguments(parser: argparse.ArgumentParser) -> None
    run(arguments: argparse.Namespace) -> int            # the exit code

It raises ScaleLLMError for whatever a user can act on; that becomes one line on standard error.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from scalellm.errors import ScaleLLMError

COMMANDS = {
    "serve": "serve a model: gateway, controller and engines",
    "chat": "talk to a running endpoint in the terminal",
    "complete": "continue one prompt at a running endpoint",
    "status": "replicas, queue and readiness of a running endpoint",
    "doctor": "what this machine has, what would run and how fast, what is missing",
    "config": "show each setting with its origin",
    "bench": "measure an endpoint, the Python API or the kernels",
    "simulate": "what a shape or a policy would make of a load, without running it",
    "calibrate": "measure what a step costs on this machine, for simulate",
    "profile": "where the time goes between a request and its tokens",
    "fetch": "download a model's files before they are needed",
    "engine": "run one engine replica",
    "keys": "make, list and revoke API keys",
    "usage": "what was used, by key, tenant, model or day",
    "gateway": "run the HTTP front alone, before any engines",
}
EXIT_USAGE, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name not in COMMANDS:
        return _no_command(given)
    module = _load(name)
    parser = argparse.ArgumentParser(
        prog=f"scalellm {name}", description=_sentence(COMMANDS[name]), allow_abbrev=False
    )
    module.add_arguments(parser)
    parsed = parser.parse_args(given[1:])
    try:
        return int(module.run(parsed))
    except ScaleLLMError as error:
        return _fail(name, parsed, error, error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        return _fail(name, parsed, error, EXIT_FAILURE)


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"scalellm.cli.{name}")


def _no_command(given: list[str]) -> int:
    """Help, the version, or the answer to a command that does not exist."""
    parser = argparse.ArgumentParser(
        prog="scalellm", description="Serves large language models, from socket to kernel."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if parser.parse_args(given).version:
        from importlib.metadata import version

        print(f"scalellm {version('scalellm')}")
        return 0
    parser.print_help(sys.stderr)
    return EXIT_USAGE


def _fail(name: str, parsed: argparse.Namespace, error: Exception, exit_code: int) -> int:
    """One line; with `--log-level debug` the traceback before it."""
    level = getattr(parsed, "log_level", None) or os.environ.get("SCALELLM_LOG_LEVEL")
    if level == "debug":
        import traceback

        traceback.print_exception(error)
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ScaleLLMError):
        message = f"{type(error).__name__}: {message} (--log-level debug shows where)"
    print(f"scalellm {name}: {message}", file=sys.stderr)
    return exit_code


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main())
