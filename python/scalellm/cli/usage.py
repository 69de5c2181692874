"""`scalellm usage`: what was used, by key, tenant, model, day, outcome or safety hook."""

import argparse
import json
import time
from typing import Any

from scalellm.cli.accounts import accounts_of
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.keys import parse_duration_s
from scalellm.cli.table import table
from scalellm.errors import ConfigError

_GROUPS = ("key", "tenant", "model", "day", "outcome", "safety")
_SUMS = (
    "requests", "failed", "running", "prompt_tokens", "cached_tokens", "output_tokens", "replays",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "usage")
    parser.add_argument(
        "--by", default="key,model", metavar="GROUPS", help=f"comma-separated: {', '.join(_GROUPS)}"
    )
    parser.add_argument("--since", metavar="TIME", help="of the last e.g. 24h or 30d")
    for field in ("key", "tenant", "model"):
        parser.add_argument(f"--{field}", dest=f"only_{field}", help=f"of this {field} alone")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(arguments: argparse.Namespace) -> int:
    groups = [name.strip() for name in arguments.by.split(",") if name.strip()]
    for name in groups:
        if name not in _GROUPS:
            raise ConfigError(f"by: got {name!r}; allowed: {', '.join(_GROUPS)}")
    query: dict[str, Any] = {"group_by": groups}
    for field in ("key", "tenant", "model"):
        if (value := getattr(arguments, f"only_{field}")) is not None:
            query[field] = value
    if arguments.since:
        query["since_ms"] = int(1e3 * (time.time() - parse_duration_s(arguments.since)))
    sums = accounts_of(resolve_arguments(arguments)).usage(query)
    if arguments.json:
        print(json.dumps(sums, indent=2))
    else:
        headings = [*groups, *(name.replace("_", " ") for name in _SUMS)]
        rows = [[str(row[name]) or "-" for name in (*groups, *_SUMS)] for row in sums]
        print("\n".join(table([headings, *rows])))
    return 0
