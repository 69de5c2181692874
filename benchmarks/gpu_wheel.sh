#!/usr/bin/env bash
# Build the wheel that gpu.sh installs on a GPU machine without Rust: .gpu/scalellm-*.whl.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf .gpu
maturin build --release --out .gpu
ls -l .gpu
