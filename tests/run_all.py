"""Every test of both languages, and one line at the end that counts them.

What was left out is named with its reason. Arguments go to pytest.
"""

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
_RUST_RESULT = re.compile(r"^test result: \S+ (\d+) passed; (\d+) failed; (\d+) ignored")
_RUST_IGNORED = re.compile(r"^test (.+) \.\.\. ignored(?:, (.*))?$")


@dataclass(slots=True)
class Counts:
    passed: int = 0
    failed: int = 0
    left_out: list[str] = field(default_factory=list)  # their reasons

    def __iadd__(self, other: "Counts") -> "Counts":
        self.passed += other.passed
        self.failed += other.failed
        self.left_out += other.left_out
        return self


def run_rust() -> Counts:
    """`cargo test` over the workspace; its output is passed on as it comes."""
    counts = Counts()
    process = subprocess.Popen(
        ["cargo", "test", "--workspace", "--no-fail-fast", "--quiet", "--", "--format=pretty"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYO3_PYTHON": sys.executable},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if not line.rstrip().endswith("... ok"):
            print(line, end="", flush=True)
        if found := _RUST_RESULT.match(line):
            counts.passed += int(found.group(1))
            counts.failed += int(found.group(2))
        elif found := _RUST_IGNORED.match(line):
            counts.left_out.append(found.group(2) or f"{found.group(1)} says no reason")
    if process.wait() and not counts.failed:
        print(f"cargo test: exit code {process.returncode}")
        counts.failed += 1
    wanted = {name.strip() for name in os.environ.get("SCALELLM_REQUIRE", "").split(",")}
    for reason in counts.left_out:
        needed = reason.removeprefix("needs ").split(":")[0]
        counts.failed += bool({"all", needed} & wanted)
    return counts


def run_python(arguments: list[str]) -> Counts:
    """pytest; its own hook turns what SCALELLM_REQUIRE names into failures."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", "--quiet", *arguments]
        exit_code = subprocess.run(command, cwd=ROOT, check=False).returncode
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else []
        for case in cases:
            if (skipped := case.find("skipped")) is not None:
                counts.left_out.append(skipped.get("message") or "no reason")
            elif case.find("failure") is not None or case.find("error") is not None:
                counts.failed += 1
            else:
                counts.passed += 1
    nothing_chosen = 5
    if exit_code not in (0, nothing_chosen) and not counts.failed:
        print(f"pytest: exit code {exit_code}")
        counts.failed += 1
    return counts


def main() -> int:
    counts = run_rust()
    counts += run_python(sys.argv[1:])
    print()
    for reason, times in sorted(Counter(counts.left_out).items()):
        print(f"left out {times}: {reason}")
    print(f"{counts.passed} passed, {counts.failed} failed, {len(counts.left_out)} skipped")
    return 1 if counts.failed or not counts.passed else 0


if __name__ == "__main__":
    sys.exit(main())
