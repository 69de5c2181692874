"""`scalellm keys create|list|revoke`: API keys of a gateway that has a database."""

import argparse
import json
import time
from typing import Any

from scalellm.cli.accounts import accounts_of
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.cli.table import table
from scalellm.errors import ConfigError

_LIMITS = {  # field: help
    "concurrency": "requests at the same time",
    "requests_per_minute": "requests in a minute",
    "tokens_per_minute": "tokens in a minute, prompt and output",
    "tokens_per_day": "tokens in a day (UTC)",
    "tokens_per_month": "tokens in a month (UTC)",
}
_SHORT = {
    "concurrency": "at once",
    "requests_per_minute": "req/min",
    "tokens_per_minute": "tok/min",
    "tokens_per_day": "tok/day",
    "tokens_per_month": "tok/month",
}
_CLASSES = ("interactive", "standard", "batch")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; its secret is printed this once")
    create.add_argument("--name", default="", help="what it is for")
    create.add_argument("--tenant", default="default", help="whose it is: tenants share fairly")
    create.add_argument("--class", dest="key_class", default="standard", choices=_CLASSES)
    create.add_argument("--weight", type=int, default=1, metavar="N", help="of the tenant's share")
    create.add_argument("--models", metavar="NAMES", help="comma-separated; default: all")
    create.add_argument("--expires-in", metavar="TIME", help="e.g. 12h or 30d; default: never")
    for field, text in _LIMITS.items():
        flag = f"--{field.replace('_', '-')}"
        create.add_argument(flag, type=int, metavar="N", help=f"limit of {text}")
    listing = actions.add_parser("list", help="all keys, without their secrets")
    revoke = actions.add_parser("revoke", help="end a key's life, within 10 seconds everywhere")
    revoke.add_argument("id")
    for action in (create, listing, revoke):
        add_settings(action, "keys")
        action.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(arguments: argparse.Namespace) -> int:
    accounts = accounts_of(resolve_arguments(arguments))
    found: Any
    if arguments.action == "create":
        found = accounts.create(_new_key(arguments))
        lines = [found["secret"], f"{found['id']}: this secret is not shown again"]
    elif arguments.action == "list":
        found = accounts.keys()
        lines = _listing(found, time.time())
    else:
        found = accounts.revoke(arguments.id)
        lines = [f"{found['id']} ({found['shown']}) is revoked"]
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))
    return 0


def _new_key(arguments: argparse.Namespace) -> dict[str, Any]:
    key: dict[str, Any] = {
        "name": arguments.name,
        "tenant": arguments.tenant,
        "class": arguments.key_class,
        "weight": arguments.weight,
        "limits": {
            field: value for field in _LIMITS if (value := getattr(arguments, field)) is not None
        },
    }
    if arguments.models:
        key["models"] = [name.strip() for name in arguments.models.split(",") if name.strip()]
    if arguments.expires_in:
        key["expires_in_s"] = parse_duration_s(arguments.expires_in)
    return key


def parse_duration_s(text: str) -> int:
    """`90s`, `15m`, `12h`, `30d` in seconds. Raises ConfigError."""
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit()) or unit not in _UNITS_S:
        raise ConfigError(f"time: got {text!r}; allowed: a number with s, m, h or d, as in 30d")
    return int(number) * _UNITS_S[unit]


def _listing(keys: list[dict[str, Any]], now_s: float) -> list[str]:
    if not keys:
        return ["no keys: `scalellm keys create` makes the first, and from then on one is needed"]
    rows = [["id", "secret", "name", "tenant", "class", "state", "limits"]]
    for key in keys:
        limits = [
            f"{value} {_SHORT[field]}"
            for field, value in key["limits"].items()
            if value is not None
        ]
        if key["models"]:
            limits.append("only " + ", ".join(key["models"]))
        rows.append([
            key["id"], key["shown"], key["name"], key["tenant"], key["class"],
            _state(key, now_s), ", ".join(limits) or "-",
        ])  # fmt: skip
    return table(rows)


def _state(key: dict[str, Any], now_s: float) -> str:
    if key["revoked_at_ms"] is not None:
        return "revoked"
    expires_ms = key["expires_at_ms"]
    if expires_ms is None:
        return "good"
    if expires_ms <= 1e3 * now_s:
        return "expired"
    return time.strftime("until %Y-%m-%d", time.gmtime(expires_ms / 1e3))
