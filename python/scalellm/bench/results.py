"""The JSON that `scalellm bench serve --json` writes: schema 1.

    {"schema": 1, "target": {...}, "machine": {...}, "workload": {...}, "interrupted": false,
     "rows": [{"concurrency": 64, "rate": null, "completed", "failed", "timed_out", "duration_s",
               "output_tok_s", "ttft_ms": {"mean", "p50", "p90", "p99", "max"}, "tbt_ms", "itl_ms",
               "max_gap_ms", "e2e_ms", "level": "ok" | "timeout", ...}]}

Rows come from the load generator (crates/load-generator, report.rs). Fields may be added within a
schema, never changed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm.errors import ConfigError

SCHEMA = 1
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """One bench run."""

    target: Mapping[str, Any]
    machine: Mapping[str, Any]
    workload: Mapping[str, Any]
    rows: tuple[Row, ...]
    interrupted: bool
    started: str  # UTC, ISO 8601
    find_max: Mapping[str, Any] | None = None  # where the highest rate was searched

    @property
    def failed(self) -> int:
        """Requests that failed or timed out."""
        return sum(row["failed"] + row["timed_out"] for row in self.rows)

    @property
    def completed(self) -> int:
        return sum(row["completed"] for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "target": dict(self.target),
            "machine": dict(self.machine),
            "workload": dict(self.workload),
            "interrupted": self.interrupted,
            **({} if self.find_max is None else {"find_max": dict(self.find_max)}),
            "rows": [dict(row) for row in self.rows],
        }

    def write(self, path: Path) -> None:
        write_document(self.to_json(), path)


def read_result(path: Path) -> Result:
    """A result that was written before. Raises ConfigError if the file is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ConfigError(f"{path}: schema {found['schema']}, allowed: {SCHEMA}")
        return Result(
            found["target"],
            found["machine"],
            found["workload"],
            tuple(found["rows"]),
            bool(found["interrupted"]),
            str(found["started"]),
            found.get("find_max"),
        )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a result of `scalellm bench serve --json`") from None


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Replace `path` in one step, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(_dump(document), encoding="utf-8")
    partial.replace(path)


def _dump(document: Mapping[str, Any]) -> str:
    """JSON with one line a field and one a row: to be read, compared and grepped."""
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    fields = [
        f"{json.dumps(name)}: {json.dumps(value)}"
        for name, value in document.items()
        if name != "rows"
    ]
    return "{\n " + ",\n ".join([*fields, f'"rows": [\n  {rows}\n ]']) + "\n}\n"


def check_writable(path: Path, flag: str = "json") -> None:
    """Raise ConfigError now rather than after an hour of measuring."""
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{flag}: no permission to write in {path.parent}")
