"""The board on the terminal: rows so far above the progress of the level that runs.

Where there is no terminal, one line a level.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from scalellm.bench.plan import Level
from scalellm.bench.results import Row
from scalellm.bench.table import result_table, row_line

# Called with the load generator's progress; whether to go on.
OnProgress = Callable[[str], bool]
_WIDE = 110


class Board:
    """Draws while a bench runs, on a console that is not its output."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self._live = Live(self._progress, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, rows: Sequence[Row]) -> None:
        """The last of `rows` has just been measured."""
        if self._console.is_terminal:
            table = result_table(rows, wide=self._console.width >= _WIDE)
            self._live.update(Group(table, self._progress))
        else:
            self._console.print(row_line(rows[-1]), soft_wrap=True, markup=False)

    @contextmanager
    def level(self, level: Level, go_on: Callable[[], bool]) -> Generator[OnProgress, None, None]:
        """Draw one level while the block runs; gives the callback for the load generator."""
        task = self._progress.add_task(f"{level.label:>6}", total=None, state="")

        def on_progress(text: str) -> bool:
            found = json.loads(text)
            done = found["completed"] + found["failed"] + found["timed_out"]
            state = _state(found)
            self._progress.update(task, completed=done, total=found["requests"], state=state)
            return go_on()

        try:
            yield on_progress
        finally:
            self._progress.remove_task(task)


def _state(found: dict[str, Any]) -> str:
    if found["phase"] == "warmup":
        return "warming up"
    rate = found["token_chunks"] / found["elapsed_s"] if found["elapsed_s"] > 0 else 0.0
    parts = [f"{found['in_flight']} open", f"{rate:.1f} chunks/s"]
    if found["failed"]:
        parts.append(f"[red]{found['failed']} failed[/red]")
    if found["timed_out"]:
        parts.append(f"[red]{found['timed_out']} timed out[/red]")
    return ", ".join(parts)
