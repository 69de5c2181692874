"""`scalellm gateway --config FILE`: the HTTP front alone."""

import argparse
from pathlib import Path

from scalellm.errors import ConfigError, ServeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the gateway's TOML file")
    parser.add_argument("--log-level", metavar="LEVEL", help="`debug` adds tracebacks to errors")


def run(arguments: argparse.Namespace) -> int:
    try:
        text = Path(arguments.config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {error}") from None
    from scalellm._core import run_gateway

    try:
        run_gateway(text, str(Path(arguments.config).resolve()))
    except ValueError as error:
        raise ConfigError(f"{arguments.config}: {error}") from None
    except OSError as error:
        raise ServeError(str(error)) from None
    return 0
