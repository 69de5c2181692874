"""All samples of a benchmark in one file, written anew after each."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers.measure import Sample
from peers.system import PeerError
from scalellm.bench.machine import describe_machine

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Record:
    """All that was measured so far, where it is kept, and the last command that added to it."""

    path: Path
    command: str
    started: str  # UTC, ISO 8601
    machine: Mapping[str, Any]
    samples: tuple[Sample, ...] = ()

    def add(self, sample: Sample) -> "Record":
        """With `sample` in the place of an earlier one of the same system, level and repeat."""
        key = _key(sample)
        kept = tuple(other for other in self.samples if _key(other) != key)
        added = replace(self, samples=(*kept, sample))
        added.write()
        return added

    def without_errors(self) -> "Record":
        return replace(self, samples=tuple(s for s in self.samples if s.error is None))

    def find(self, system: str, concurrency: int, repeat: int) -> Sample | None:
        wanted = (system, concurrency, repeat)
        return next((sample for sample in self.samples if _key(sample) == wanted), None)

    def write(self) -> None:
        """Replace the file in one step."""
        document = {
            "schema": SCHEMA,
            "command": self.command,
            "started": self.started,
            "machine": dict(self.machine),
            "samples": [sample.to_json() for sample in self.samples],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def _key(sample: Sample) -> tuple[str, int, int]:
    return sample.system, sample.concurrency, sample.repeat


def new_record(path: Path, command: str) -> Record:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(path, command, started, describe_machine())


def read_record(path: Path) -> Record:
    """An earlier call's record. Raises PeerError if it is none or of another machine."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        samples = tuple(Sample(**fields) for fields in document["samples"])
        found = Record(path, document["command"], document["started"], document["machine"], samples)
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"{path}: not a record of this benchmark: {error}") from None
    here = describe_machine()
    if any(found.machine.get(name) != here[name] for name in ("cpu", "cores_usable")):
        raise PeerError(f"{path}: measured on another machine; --fresh begins anew")
    return found
