"""Python environments of peers: each its own, of exactly the versions that its pins name.

`pins/NAME.txt` is the whole closure, NAME==VERSION a line, installed without looking at what the
packages themselves ask for: that is also how a package is left out that a peer asks for in vain.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peers.system import PeerError, tail

_PINS = Path(__file__).resolve().parent / "pins"
_INSTALL_WITHIN_S = 3600.0


def python_environment(cache: Path, name: str, log: Path) -> Path:
    """The Python of the environment `name` below `cache`; made again when its pins changed."""
    pins = _PINS / f"{name}.txt"
    folder = cache / name / "env"
    python = folder / "bin" / "python"
    stamp = folder / "pins.sha256"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return python
    call([sys.executable, "-m", "venv", "--clear", str(folder)], log)
    pip = [str(python), "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
    call([*pip, "-r", str(pins)], log)
    stamp.write_text(digest, encoding="utf-8")
    return python


def call(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Run to the end, what it says into `log`. Raises PeerError if it fails or takes an hour."""
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_INSTALL_WITHIN_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"{command[0]}: {error}") from None
    if done.returncode:
        words = " ".join(command[:6])
        raise PeerError(f"{words} ...: ended with code {done.returncode}: {tail(log)}")
