"""Formatters, linters and types of both languages, and the rules no other tool checks."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# The name that every lock file gives the public registry; anything else would be somebody's mirror.
_REGISTRY = 'source = "registry+https://github.com/rust-lang/crates.io-index"'
_ADDRESS = re.compile(r"\w+://|^\s*(-i|-f|--\S*index\S*|--find-links|--trusted-host)\b")


def settings_documented() -> str | None:
    """docs/settings.md is what `scalellm config docs` writes."""
    command = [str(BIN / "scalellm"), "config", "docs"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        return made.stderr
    same = made.stdout == (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    return None if same else "docs/settings.md is not up to date; `make docs` writes it"


def no_addresses() -> str | None:
    """Lock and constraint files carry names and versions, and no download addresses."""
    bad = []
    for name in ("constraints.txt", "Cargo.lock", "fuzz/Cargo.lock"):
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            if line != _REGISTRY and _ADDRESS.search(line):
                bad.append(f"{name}:{number}: {line.strip()}")
    return "\n".join(bad) or None


def constraints_exact() -> str | None:
    """Every constraint is one version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    bad = [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)]
    return "constraints.txt: not NAME==VERSION: " + ", ".join(bad) if bad else None


COMMANDS: dict[str, list[str]] = {
    "ruff format": [str(BIN / "ruff"), "format", "--check", "--quiet", "."],
    "ruff check": [str(BIN / "ruff"), "check", "--quiet", "."],
    "mypy": [str(BIN / "mypy")],
    "lint-imports": [str(BIN / "lint-imports"), "--no-cache"],
    "cargo fmt": ["cargo", "fmt", "--all", "--check"],
    "cargo clippy": [
        *("cargo", "clippy", "--workspace", "--all-targets", "--quiet"),
        *("--", "-D", "warnings"),
    ],
}
RULES: dict[str, Callable[[], str | None]] = {
    "settings documented": settings_documented,
    "no addresses in lock files": no_addresses,
    "constraints exact": constraints_exact,
}


def main() -> int:
    """Run all of them, show the output of those that fail."""
    failed = 0
    environment = {**os.environ, "PYO3_PYTHON": sys.executable}
    for name, command in COMMANDS.items():
        if shutil.which(command[0]) is None:
            text, bad = f"{command[0]} is not installed; `make setup`", True
        else:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
            )
            text, bad = done.stdout + done.stderr, done.returncode != 0
        failed += _show(name, text if bad else None)
    for name, rule in RULES.items():
        failed += _show(name, rule())
    print("all checks passed" if not failed else f"{failed} checks failed")
    return 1 if failed else 0


def _show(name: str, problem: str | None) -> bool:
    print(f"{'FAILED' if problem is not None else 'ok':<6}  {name}", flush=True)
    if problem is not None:
        print(problem.rstrip(), flush=True)
    return problem is not None


if __name__ == "__main__":
    sys.exit(main())
