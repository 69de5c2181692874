"""Live progress of a level on the terminal; one line a level where there is none."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from scalellm.bench.plan import Level

# Called with the load generator's progress; whether to go on.
OnProgress = Callable[[str], bool]


@contextmanager
def level_progress(
    level: Level, console: Console, go_on: Callable[[], bool]
) -> Generator[OnProgress, None, None]:
    """Draw one level's progress while the block runs; gives the callback for the load generator."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=5) as progress:
        task = progress.add_task(f"{level.label:>6}", total=None, state="")

        def on_progress(text: str) -> bool:
            found = json.loads(text)
            done = found["completed"] + found["failed"] + found["timed_out"]
            progress.update(task, completed=done, total=found["requests"], state=_state(found))
            return go_on()

        yield on_progress


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
