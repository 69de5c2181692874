"""Many switches and many faults under streams: the chaos tests at length, and what came of them.

    python benchmarks/bench_endurance.py                            all, then docs/performance.md
    python benchmarks/bench_endurance.py --part switches --switches 50 --docs none

Each part is a test that is given more to do, or a few that are not run everywhere; it fails as they
fail, or are left out. Nothing here is a time, so other work on the machine does no harm.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from document import write_section

from scalellm.bench.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "switches": "tests/chaos/test_switches.py::test_streams_outlive_forced_switches[beside]",
    "after": "tests/chaos/test_switches.py::test_streams_outlive_forced_switches[after]",
    "faults": "tests/chaos/test_any_process.py",
    "ray": "tests/integration/test_ray.py",
}
SENTENCES = {
    "switches": (
        "{switches} forced switches between 1 x TP 2 and 2 x TP 1 under {streams} streams in "
        "{seconds} s: {answers} answers, greedy and sampled, of which {wrong} was another than the "
        "undisturbed one or an error; requests moved {moves} times."
    ),
    "after": (
        "{switches} more without room for both, the old shape gone before the new one has "
        "memory, under {streams} streams in {seconds} s: {answers} answers, of which {wrong} was "
        "another or an error; requests moved {moves} times."
    ),
    "faults": (
        "{faults} processes killed, stopped or slowed at random in {seconds} s under {streams} "
        "streams, each when all was whole again (at the latest after {healed_s} s): {answers} "
        "undisturbed answers, {told} that ended with one clear error or with the gateway's "
        "connection, {wrong} otherwise; requests moved {moves} times."
    ),
    "ray": (
        "Engines in a Ray cluster of two nodes on one machine: {tests} tests of what is placed "
        "where, a node that is lost under a stream, and a drain."
    ),
}


def run(part: str, amounts: Mapping[str, int]) -> tuple[bool, Mapping[str, str]]:
    """Whether the part's tests passed, all of them, and what they recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--log-cli-level=info"]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1", TESTS[part]]
        environment = {**os.environ, "SCALELLM_REQUIRE": "all"}
        environment |= {name: str(amount) for name, amount in amounts.items()}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if not report.is_file():
            return False, {}
        found = ElementTree.parse(report)
        recorded = {
            one.attrib["name"]: _rounded(one.attrib["value"]) for one in found.iter("property")
        }
        recorded["tests"] = str(sum(1 for _ in found.iter("testcase")))
    return done.returncode == 0, recorded


def _rounded(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if value.is_integer() or value >= 100 else f"{value:.1f}"


def section(recorded: Mapping[str, Mapping[str, str]], command: str) -> str:
    """The Markdown between the markers of docs/performance.md."""
    lines = [SENTENCES[part].format_map(found) for part, found in recorded.items()]
    machine = f"The demo model on {describe_machine()['cpu']}. With\n\n    {command}"
    return "\n\n".join([*lines, machine]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=200, help="that are forced")
    parser.add_argument("--chaos-s", type=int, default=300, help="seconds of faults")
    parser.add_argument("--part", choices=TESTS, action="append", help="default: what can be run")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "performance.md"), help="or none")
    options = parser.parse_args(given)
    amounts = {"SCALELLM_SWITCHES": options.switches, "SCALELLM_CHAOS_S": options.chaos_s}
    parts = options.part or list(TESTS)
    if not options.part and find_spec("ray") is None:
        parts.remove("ray")
        print("ray is left out: it is not installed")
    outcomes = {part: run(part, amounts) for part in parts}
    passed = {part: found for part, (is_good, found) in outcomes.items() if is_good}
    text = section(passed, shlex.join(["python", "benchmarks/bench_endurance.py", *given]))
    print(text)
    if passed and options.docs != "none":
        write_section(Path(options.docs), "blueprint-endurance", text)
    return 0 if len(passed) == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
