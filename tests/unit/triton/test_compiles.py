"""Every kernel compiles to machine code for Hopper, from a machine without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "_rms_norm", "_quantise_rows", "_store_kv", "_decode", "_combine", "_prefill", "_linear",
    "_route", "_sort", "_experts", "_peaks", "_masses", "_draw", "_truncated",
}  # fmt: skip
HOPPER_SHARED_BYTES = 227 << 10  # of one program, at most


def test_for_hopper():
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == KERNELS
    assert all(int(shared) <= HOPPER_SHARED_BYTES and int(size) for _, shared, size in compiled)
