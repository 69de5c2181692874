#!/usr/bin/env bash
# Check every Triton kernel on this machine's GPU and measure: figures.json and summary.md in $OUT.
#
#   benchmarks/gpu.sh                             everything, the most wanted first
#   benchmarks/gpu.sh --parts kernels,steps       these parts of gpu_figures.py
#   benchmarks/gpu.sh --minutes 9                 what can be had within them; parts that were cut off
#                                                 or did not begin are named, and come next time
#
# A second call keeps what the first has found. Needs Python 3.12 with torch 2.11, triton 3.6,
# transformers and pytest; no network, no Rust. Where ScaleLLM is not installed, it is taken from the
# wheel that gpu_wheel.sh has put into .gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/gpu-results}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

command -v nvidia-smi >/dev/null || { echo "gpu.sh: no NVIDIA GPU here" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
if ! python3 -c 'import scalellm._core' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .gpu/scalellm-*.whl
    export PYTHONPATH=$site
fi
python3 benchmarks/gpu_figures.py --out "$OUT" "$@"
