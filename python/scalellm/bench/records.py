"""The requests of one row, from the columns that the load generator writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.bench.results import Row


@dataclass(frozen=True, slots=True)
class Records:
    requests: tuple[Mapping[str, Any], ...]

    @staticmethod
    def of(row: Row) -> "Records":
        found = row.get("records") or {"columns": (), "rows": ()}
        names: Sequence[str] = found["columns"]
        return Records(tuple(dict(zip(names, values, strict=True)) for values in found["rows"]))

    def completed(self) -> list[Mapping[str, Any]]:
        return [request for request in self.by_start() if request["outcome"] == "completed"]

    def by_start(self) -> list[Mapping[str, Any]]:
        """In the order in which they were sent or should have been."""
        return sorted(self.requests, key=lambda request: float(request["start_ms"]))
