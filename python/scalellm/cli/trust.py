"""The flags that say whom to believe of an https target."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scalellm.bench.target import Trust


def add_trust(parser: argparse.ArgumentParser, command: str) -> None:
    tls = parser.add_argument_group("https")
    tls.add_argument(
        "--ca-cert",
        type=Path,
        metavar="FILE",
        dest=f"{command}_ca_cert",
        help="PEM: authorities to believe beside the public ones",
    )
    tls.add_argument(
        "--insecure",
        action="store_true",
        dest=f"{command}_insecure",
        help="take any certificate",
    )


def trust_of(arguments: argparse.Namespace, command: str) -> "Trust":
    """What the flags say. Raises ConfigError."""
    from scalellm.bench.target import Trust

    return Trust.read(
        getattr(arguments, f"{command}_ca_cert"), getattr(arguments, f"{command}_insecure")
    )
