"""`scalellm bench compare`: which differences between two results are noise."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from scalellm.bench.compare import Difference

_FILE_WIDTH = 120
_EXIT_OK, _EXIT_WORSE = 0, 1
_COLOURS = {"better": "green", "worse": "red", "noise": "dim", "unknown": "dim"}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="two results: ratios, their spread, which differences are noise",
        description="Compares two files that `bench serve --json` wrote, level by level.",
        allow_abbrev=False,
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument(
        "--floor",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="differences below this are noise whatever their spread; default: 0.02",
    )
    parser.add_argument(
        "--fail-if-worse", action="store_true", help="exit code 1 if a figure of B is worse"
    )
    parser.set_defaults(bench_run=run)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from scalellm.bench.compare import compare, remarks
    from scalellm.bench.results import read_result

    if not 0 <= arguments.floor < 1:
        raise ConfigError(f"--floor: got {arguments.floor}, allowed: 0 to below 1")
    a, b = read_result(arguments.a), read_result(arguments.b)
    found = compare(a, b, arguments.floor)
    if not found:
        raise ConfigError(f"{arguments.a} and {arguments.b} have no level in common")
    # Written to a file or pipe the table need not fit a screen.
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(_table(found))
    for line in remarks(a, b):
        console.print(Text(f"careful: {line}", style="yellow"), soft_wrap=True)
    worse = any(difference.verdict == "worse" for difference in found)
    return _EXIT_WORSE if worse and arguments.fail_if_worse else _EXIT_OK


def _table(found: "list[Difference]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from scalellm.bench.table import NOT_MEASURED, milliseconds

    table = Table(title="ratios with their 95% interval", title_justify="left", title_style="dim")
    for name in ("level", "figure", "A", "B", "B / A", "interval", "spread of", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for difference in found:
        low, high = difference.low, difference.high
        interval = NOT_MEASURED if low is None else f"{low:.3f} to {high:.3f}"
        table.add_row(
            difference.level,
            difference.metric,
            milliseconds(difference.a),
            milliseconds(difference.b),
            f"{difference.ratio:.3f}",
            interval,
            difference.by,
            Text(difference.verdict, style=_COLOURS[difference.verdict]),
        )
    return table
