"""Leaving a test out is a skip with a reason, and a failure where SCALELLM_REQUIRE names it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LEFT_OUT = """
import pytest
def test_moon():
    pytest.skip("needs moon: clouds")
def test_other():
    pytest.skip("takes an hour")
def test_here():
    pass
"""


@pytest.mark.parametrize(
    ("required", "outcome"),
    [
        ("", "1 passed, 2 skipped"),
        ("sun", "1 passed, 2 skipped"),
        ("sun, moon", "1 failed, 1 passed, 1 skipped"),
        ("all", "2 failed, 1 passed"),
    ],
)
def test_require_turns_leaving_out_into_failing(
    tmp_path: Path, required: str, outcome: str
) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(LEFT_OUT)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=os.environ | {"SCALELLM_REQUIRE": required},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert outcome in done.stdout.splitlines()[-1]
    if "skipped" in outcome:
        assert "takes an hour" in done.stdout
