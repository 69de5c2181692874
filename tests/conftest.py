"""What tests may need of a machine. Leaving a test out is a skip that says why.

    @pytest.mark.needs("gpu")

skips where there is none, with the reason "needs gpu: ...", and fails where SCALELLM_REQUIRE names
it (`SCALELLM_REQUIRE=gpu,chromium`, or `all`).
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Triton decides while it is imported whether kernels are interpreted, and any test may be the first
# to import it.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def _gpu() -> str | None:
    return None if Path("/dev/nvidia0").exists() else "no NVIDIA device"


def _flashinfer() -> str | None:
    return _gpu() or (None if find_spec("flashinfer") else "it is not installed")


def _two_cores() -> str | None:
    cores = len(os.sched_getaffinity(0))
    return None if cores >= 2 else f"{cores} core"


def _postgres() -> str | None:
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        return "no initdb"
    if os.geteuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        return "it does not run as root, and there is no user postgres"
    return None


def _helm() -> str | None:
    if not shutil.which("helm"):
        return "no helm"
    return None if find_spec("kubernetes_validate") else "no kubernetes-validate"


def downloaded(module: str) -> subprocess.CompletedProcess[str]:
    """What Go says of a module that `.ci/run` has downloaded: nothing is fetched in a test."""
    return subprocess.run(
        ["go", "mod", "download", "-json", module],
        env={**os.environ, "GOPROXY": "off", "GOFLAGS": "-modcacherw"},
        capture_output=True,
        text=True,
        check=False,
    )


def _chart_kinds() -> str | None:
    kinds = Path(__file__).with_name("integration") / "chart_kinds.txt"
    modules = [line.split()[1] for line in kinds.read_text().splitlines()]
    if not shutil.which("go"):
        return "no go"
    missing = [module for module in modules if downloaded(module).returncode != 0]
    return f"not downloaded: {', '.join(missing)}" if missing else None


def _ray() -> str | None:
    return None if find_spec("ray") else "it is not installed"


def _schemathesis() -> str | None:
    return None if find_spec("schemathesis") else "it is not installed"


def _cc() -> str | None:
    return None if shutil.which("cc") else "no C compiler"


# What a test may need -> why it is not there, or None.
PROBES: dict[str, Callable[[], str | None]] = {
    "cc": _cc,
    "chart-kinds": _chart_kinds,
    "flashinfer": _flashinfer,
    "gpu": _gpu,
    "helm": _helm,
    "postgres": _postgres,
    "ray": _ray,
    "schemathesis": _schemathesis,
    "two-cores": _two_cores,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(name): left out where the machine has no such thing")
    # What is started by tests keeps nothing in the user's folder.
    state = tempfile.TemporaryDirectory(prefix="scalellm-state-")
    config.add_cleanup(state.cleanup)
    os.environ["XDG_STATE_HOME"] = state.name


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        name = mark.args[0]
        if (reason := PROBES[name]()) is not None:
            pytest.skip(f"needs {name}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and is_required(_reason(report)):
        report.outcome = "failed"
        report.longrepr = f"left out, but SCALELLM_REQUIRE wants it: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport) -> str:
    found = report.longrepr
    text = str(found[2]) if isinstance(found, tuple) else str(found)
    return text.removeprefix("Skipped: ")


def is_required(reason: str) -> bool:
    """Whether SCALELLM_REQUIRE forbids leaving out a test for this reason."""
    wanted = {name.strip() for name in os.environ.get("SCALELLM_REQUIRE", "").split(",")}
    words = reason.split()
    needed = words[1].rstrip(":") if len(words) > 1 and words[0] == "needs" else ""
    return "all" in wanted or (needed in wanted and needed != "")
