"""The file that `/admin/v1/blueprint` shows of a model.

The controller writes that of a model whose shape changes (steering.py), the root that of another.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all: the gateway may read at any time."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(state), encoding="utf-8")
    part.replace(file)


def note_given_up(file: Path, replica: str, reason: str) -> None:
    """Tell with which reason a replica is not started again."""
    with suppress(OSError, ValueError):  # it says less than it could, and the deployment goes on
        state = json.loads(file.read_text(encoding="utf-8"))
        given_up = {**state.get("given_up", {}), replica: reason}
        write_state(file, {**state, "given_up": given_up})
