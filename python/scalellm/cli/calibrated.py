"""The calibration that `serve --blueprint auto` decides by, where none was given.

It belongs to a machine, a model's shape and the engine's settings. Where the user's cache folder
has none for these three, `scalellm calibrate` measures one, in a process of its own, before
anything is started; later starts find it there.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalellm.cli.machine import package_version
from scalellm.config import ServeConfig
from scalellm.controller.blueprint.cost import shipped
from scalellm.controller.child import PYTHON, die_with_parent
from scalellm.controller.launchers.flags import engine_flags
from scalellm.controller.report import Report
from scalellm.errors import ServeError

_SHOWN = 400  # characters of what a failed measurement said


def calibrated(
    config: ServeConfig, model_path: Path, widths: Sequence[int], devices: int, report: Report
) -> ServeConfig:
    """`config` with the name of a calibration file, which is measured if there is none.

    Raises ServeError if that fails."""
    file = _folder() / _name(config, model_path, widths, devices)
    if not file.is_file():
        began_s = report.elapsed_s()
        shown = " and ".join(f"TP {width}" for width in widths)
        report.event(f"measuring what steps of {shown} cost here; later starts know")
        _measure(config, model_path, widths, devices, file)
        report.phase("calibrate", report.elapsed_s() - began_s, str(file))
    return replace(config, blueprint=replace(config.blueprint, calibration=str(file)))


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "scalellm" / "calibrations"


def _name(config: ServeConfig, model_path: Path, widths: Sequence[int], devices: int) -> str:
    """Of the file: the model's folder for people, and a digest of all that costs depend on."""
    from scalellm.bench.machine import describe_machine

    machine = describe_machine()
    facts = {
        "version": package_version("scalellm"),
        "machine": [machine[name] for name in ("cpu", "cpu_flags", "cores_usable", "gpus")],
        "model": (model_path / "config.json").read_text(encoding="utf-8"),
        "engine": engine_flags(config.engine, config.log, "model"),
        "widths": list(widths),
        "devices": devices,
    }
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return f"{model_path.name}-{digest[:16]}.toml"


def _measure(
    config: ServeConfig, model_path: Path, widths: Sequence[int], devices: int, file: Path
) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        ran = subprocess.run(
            [
                *(*PYTHON, "scalellm", "calibrate", str(model_path)),
                *engine_flags(config.engine, config.log, "model"),
                *("--widths", ",".join(str(width) for width in widths)),
                *("--devices", str(devices), "--short", "--alone", "--write", str(part)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent(),
            check=False,
        )
        if ran.returncode != 0:
            said = ran.stderr.decode(errors="replace").strip()[-_SHOWN:]
            raise ServeError(
                f"the steps' costs could not be measured (exit code {ran.returncode}): {said}; "
                f"--calibration names a file that has them, or one of {', '.join(shipped())}"
            )
        part.replace(file)
    except OSError as error:
        raise ServeError(
            f"no calibration can be kept in {file.parent}: {error.strerror or error}; "
            "--calibration names a file that has one"
        ) from None
    finally:
        part.unlink(missing_ok=True)
