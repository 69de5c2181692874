"""Measure everything that docs/gpu.md speaks of on this machine's GPU. benchmarks/gpu.sh calls it.

    python benchmarks/gpu_figures.py --out gpu-results                     all parts
    python benchmarks/gpu_figures.py --out gpu-results --parts kernels,mixtral

Each part is written to figures.json and summary.md as it ends, beside what is there already. A part
that fails is written down with its error, and the others go on.
"""

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import make_shape
import torch
import triton
from on_gpu import kernels, peer, serving, steps, timing
from on_gpu.summary import summary

from scalellm.bench.machine import describe_machine
from scalellm.bench.plan import Workload

MIXTRAL, QWEN3 = "mixtral-8x7b", "qwen3-0.6b"
_WORKLOADS = {
    MIXTRAL: Workload(input_tokens=512, output_tokens=128),
    QWEN3: Workload(input_tokens=128, output_tokens=64),
}
_FLAGS = ["--dtype", "bfloat16", "--max-model-len", "4096"]


class Figures:
    """What was measured, kept on disk."""

    def __init__(self, out: Path, shapes: Path) -> None:
        self._out, self._shapes = out, shapes
        self._path = out / "figures.json"
        self._found: dict[str, Any] = (
            json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        )

    def folder(self, shape: str) -> Path:
        folder = self._shapes / shape
        if not folder.exists():
            make_shape.write(shape, folder)
        return folder

    def run(self, part: str) -> bool:
        """Measure a part and write it; whether it succeeded."""
        began = datetime.now(UTC)
        print(f"{part} ...", flush=True)
        try:
            found = getattr(self, f"_{part}")()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        self._found[part] = found
        self._found["machine"] = _machine()
        torch.cuda.empty_cache()
        self._path.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")
        (self._out / "summary.md").write_text(summary(self._found), encoding="utf-8")
        spent_s = (datetime.now(UTC) - began).total_seconds()
        failed = isinstance(found, dict) and "error" in found
        print(f"{part} {'failed' if failed else 'ended'} after {spent_s:.0f} s", flush=True)
        return not failed

    def _ceilings(self) -> dict[str, float]:
        return timing.ceilings()

    def _kernels(self) -> list[dict[str, Any]]:
        if "read_gb_s" not in self._found.get("ceilings", {}):
            self._found["ceilings"] = timing.ceilings()
        return kernels.measure(self._found["ceilings"])

    def _steps(self) -> dict[str, Any]:
        return {
            QWEN3: _or_error(lambda: steps.measure(self.folder(QWEN3), "none", 160, (1, 8, 64))),
            MIXTRAL: _or_error(
                lambda: steps.measure(self.folder(MIXTRAL), "fp8", 576, (1, 8, 32, 64))
            ),
        }

    def _experts(self) -> list[dict[str, Any]]:
        return steps.experts_read(self.folder(MIXTRAL), (1, 8, 32, 64))

    def _mixtral(self) -> dict[str, Any]:
        return self._serve(MIXTRAL, ["--quantization", "fp8"], (1, 8, 32, 64))

    def _qwen3(self) -> dict[str, Any]:
        return self._serve(QWEN3, ["--quantization", "none"], (1, 8, 64))

    def _serve(self, shape: str, flags: list[str], levels: tuple[int, ...]) -> dict[str, Any]:
        log = self._out / f"{shape}.log"
        return serving.measure(
            self.folder(shape), [*_FLAGS, *flags], _WORKLOADS[shape], levels, log
        )

    def _peers(self) -> dict[str, Any]:
        return {
            shape: _or_error(
                lambda shape=shape, work=work: peer.measure(
                    self.folder(shape), work.input_tokens, work.output_tokens, (1, 8, 32, 64)
                )
            )
            for shape, work in _WORKLOADS.items()
        }


def _or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        torch.cuda.empty_cache()


def _machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    return {"measured": measured, **versions, **describe_machine()}


PARTS = ("ceilings", "kernels", "steps", "qwen3", "mixtral", "experts", "peers")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    options = parser.parse_args()
    wanted = options.parts.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--parts: got {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as shapes:
        figures = Figures(options.out, Path(shapes))
        succeeded = [figures.run(part) for part in wanted]
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
