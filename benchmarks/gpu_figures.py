"""Measure everything that docs/gpu.md speaks of on this machine's GPU. benchmarks/gpu.sh calls it.

    python benchmarks/gpu_figures.py --out gpu-results                     all parts
    python benchmarks/gpu_figures.py --out gpu-results --parts kernels,mixtral --minutes 5

Parts run in the order of PARTS, the most wanted first, each in a process and within a time of its
own. As each ends, figures.json and summary.md have what is known, beside what was there already,
and its section is printed. A part that fails is written down with its error and what it had.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import make_shape
from on_gpu import parts
from on_gpu.summary import section, summary

MIXTRAL, QWEN3 = "mixtral-8x7b", "qwen3-0.6b"
_FLAGS = ["--dtype", "bfloat16", "--max-model-len", "4096"]
_FP8, _BF16 = ["--quantization", "fp8"], ["--quantization", "none"]
ROOT = Path(__file__).resolve().parent.parent

# Part -> seconds it may take, in the order of worth.
PARTS: Mapping[str, float] = {
    "ceilings": 60,
    "mixtral": 270,
    "experts": 120,
    "check": 170,
    "steps": 150,
    "kernels": 90,
    "prefill": 120,
    "qwen3": 120,
    "ready": 90,
    "shapes": 300,
    "ranks": 300,
    "peers": 280,
}


class Figures:
    """What was measured, kept on disk."""

    def __init__(self, out: Path, shapes: Path) -> None:
        self._out, self._folders = out, shapes
        self._path = out / "figures.json"
        self.found: dict[str, Any] = (
            json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        )

    def folder(self, shape: str) -> Path:
        folder = self._folders / shape
        if not folder.exists():
            make_shape.write(shape, folder)
        return folder

    def write(self, part: str, found: Any) -> None:
        self.found[part] = found
        self._path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        (self._out / "summary.md").write_text(summary(self.found), encoding="utf-8")

    def run(self, part: str, seconds: float) -> None:
        """Measure a part and write it, with the reason where it did not succeed."""
        found: Any = {}
        try:
            self.write("machine", _machine())

            def measure() -> None:
                nonlocal found
                found = getattr(self, f"_{part}")()

            parts.within(seconds, measure)
        except Exception as error:
            traceback.print_exc()
            found = _failed(error)
        self.write(part, found)

    def _ceilings(self) -> dict[str, float]:
        from on_gpu import timing

        return timing.ceilings()

    def _check(self) -> dict[str, Any]:
        """Every kernel beside its reference, compiled for this GPU."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--deselect", "tests/unit/triton/test_compiles.py", "tests/unit/triton"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "8"]  # most of the time is Triton's compiler's
        log = self._out / "check.log"
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {"passed": code == 0, "result": lines[-1] if lines else "", "wrong": wrong[:40]}

    def _kernels(self) -> list[dict[str, Any]]:
        from on_gpu import kernels, timing

        ceilings = self.found.get("ceilings", {})
        if "read_gb_s" not in ceilings:
            self.write("ceilings", ceilings := timing.ceilings())
        return kernels.measure(ceilings)

    def _prefill(self) -> list[dict[str, Any]]:
        from on_gpu import prefill

        return prefill.measure({name: make_shape.SHAPES[name] for name in (MIXTRAL, QWEN3)})

    def _steps(self) -> dict[str, Any]:
        from on_gpu import steps

        found: dict[str, Any] = {}
        for shape, quantization, context in ((MIXTRAL, "fp8", 576), (QWEN3, "none", 160)):
            folder = self.folder(shape)
            found[shape] = _or_error(
                partial(steps.measure, folder, quantization, context, (1, 8, 32, 64))
            )
            self.write("steps", found)
        return found

    def _mixtral(self) -> dict[str, Any]:
        return self._serve(MIXTRAL, _FP8, (1, 64, 8, 32))

    def _experts(self) -> list[dict[str, Any]]:
        from on_gpu import steps

        return steps.experts_read(self.folder(MIXTRAL), (1, 8, 32, 64))

    def _qwen3(self) -> dict[str, Any]:
        return self._serve(QWEN3, _BF16, (1, 8, 64))

    def _ready(self) -> dict[str, float]:
        """Once kernels are compiled, as every start but a machine's first is."""
        found = {}
        for shape, flags in ((MIXTRAL, _FP8), (QWEN3, _BF16)):
            found[shape] = self._serve(shape, flags, ())["ready_after_s"]
            self.write("ready", found)
        return found

    def _shapes(self) -> dict[str, Any]:
        import torch
        from on_gpu import shapes

        log = self._out / "shapes.log"
        flags = [*_FLAGS, *_BF16]
        return shapes.measure(self.folder(QWEN3), flags, torch.cuda.device_count(), log)

    def _ranks(self) -> dict[str, Any]:
        """Several GPUs, each a part of every layer, or of the experts whole ones."""
        import torch

        found: dict[str, Any] = {}
        for count in (2, 4, 8):
            if torch.cuda.device_count() < count:
                break
            flags = [*_FP8, "--tensor-parallel-size", str(count)]
            for more in ([], ["--enable-expert-parallel"]):
                name = f"{count} GPUs{', whole experts' if more else ''}"
                found[name] = _or_error(partial(self._serve, MIXTRAL, [*flags, *more], (1, 64)))
                self.write("ranks", found)
        return found

    def _serve(self, shape: str, flags: list[str], levels: tuple[int, ...]) -> dict[str, Any]:
        from on_gpu import serving

        workload = serving.WORKLOADS[shape]
        log = self._out / f"{shape}.log"
        return serving.measure(self.folder(shape), [*_FLAGS, *flags], workload, levels, log)

    def _peers(self) -> dict[str, Any]:
        from on_gpu import peer, serving

        found: dict[str, Any] = {}
        for shape, work in serving.WORKLOADS.items():
            tokens = (work.input_tokens, work.output_tokens)
            found[shape] = _or_error(
                partial(peer.measure, self.folder(shape), *tokens, (1, 8, 32, 64))
            )
            self.write("peers", found)
        return found


def _failed(error: Exception) -> dict[str, Any]:
    """With what was measured before it, where the error says so."""
    kept: dict[str, Any] = getattr(error, "measured", {})
    return kept | {"error": f"{type(error).__name__}: {error}"[:500]}


def _or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds, or its error; a part's end goes on to whoever called it."""
    import torch

    try:
        return measure()
    except parts.OutOfTimeError:
        raise
    except Exception as error:
        traceback.print_exc()
        return _failed(error)
    finally:
        torch.cuda.empty_cache()


def _machine() -> dict[str, Any]:
    import torch
    import triton

    from scalellm.bench.machine import describe_machine

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    return {"measured": measured, **versions, **describe_machine()}


def run_all(out: Path, wanted: list[str], minutes: float) -> bool:
    """Every part in a process of its own; whether all succeeded."""
    succeeded = True

    def command(part: str, seconds: float) -> list[str]:
        parts.say(f"{part}: at most {seconds:.0f} s")
        return [sys.executable, __file__, f"--out={out}", f"--only={part}", f"--seconds={seconds}"]

    def ended(part: str, why: str | None) -> None:
        nonlocal succeeded
        figures = Figures(out, out)
        found = figures.found.get(part)
        if why is not None:
            kept = found if isinstance(found, dict) else {}
            figures.write(part, kept | {"error": why})
        parts.say("\n".join(section(part, figures.found)))
        found = figures.found.get(part)
        succeeded = succeeded and not (isinstance(found, dict) and "error" in found)

    limits = {part: limit for part, limit in PARTS.items() if part in wanted}
    parts.run_parts(limits, command, parts.clock(minutes), ended)
    return succeeded


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all of them")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only is not None:
        with tempfile.TemporaryDirectory() as shapes:
            Figures(options.out, Path(shapes)).run(options.only, options.seconds)
        return 0
    wanted = options.parts.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--parts: got {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    succeeded = run_all(options.out, wanted, options.minutes)
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
