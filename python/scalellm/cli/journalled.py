"""Where `serve --blueprint auto` keeps its decisions, unless another place was asked for.

Each start of a deployment has a file of its own in the user's state folder, so that several at once
do not mix their lines, whatever machines share the folder. Old files go when a new one is made.
"""

import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from scalellm.config import ServeConfig
from scalellm.controller.report import Report
from scalellm.controller.shapes import served_name

_KEPT = 32  # files


def journalled(config: ServeConfig, report: Report) -> ServeConfig:
    """`config` with the file that each decision goes to, or with none where none can be kept."""
    file = config.blueprint.journal_file
    if config.blueprint.journal is None:
        try:
            file = _new_file(served_name(config.engine))
        except OSError as error:
            report.event(f"decisions about the shape are not kept: {error}")
    if file is not None:
        report.event(f"decisions about the shape are kept in {file}")
    journal = None if file is None else str(file)
    return replace(config, blueprint=replace(config.blueprint, journal=journal))


def _folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "scalellm" / "journals"


def _new_file(model: str) -> Path:
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(OSError):  # somebody else removes them too
        files = sorted(folder.glob("*.jsonl*"), key=lambda file: file.stat().st_mtime)
        for file in files[: 1 - _KEPT]:
            file.unlink()
    name = re.sub(r"[^\w.-]+", "-", model.rpartition("/")[2])[:64]
    begun = time.strftime("%Y%m%d-%H%M%S")
    descriptor, path = tempfile.mkstemp(".jsonl", f"{name}-{begun}-", folder)
    os.close(descriptor)
    return Path(path)
