"""`scalellm bench kernels`: each CPU kernel against this machine's measured ceilings."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.cli.model import check_folder, resolve_model
from scalellm.cli.table import table
from scalellm.errors import ConfigError

if TYPE_CHECKING:
    from scalellm.bench.model_shape import ModelShape, Precision
    from scalellm.bench.timing import Timed

_EXIT_OK, _EXIT_INTERRUPTED = 0, 130
_EPILOG = """\
Ceilings are measured beside each op: reading memory, and products of registers alone by the
instructions that the kernels use. `of roofline` is the least time that they allow, by the time
measured.

examples:
  scalellm bench kernels
  scalellm bench kernels --ops linear --formats int8 --rows 1,64 --seconds 1
  scalellm bench kernels --model /models/Llama-3.1-8B --json kernels.json
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "kernels",
        help="each CPU kernel against what the machine can do",
        description="Times the CPU's kernels and compares them with measured ceilings.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="whose shapes; default: those of Qwen3-0.6B"
    )
    parser.add_argument(
        "--ops", default="linear,attention,rows", metavar="NAMES", help="default: %(default)s"
    )
    parser.add_argument(
        "--formats", default="bf16,int8,int4", metavar="NAMES", help="of linears; default: all"
    )
    parser.add_argument(
        "--rows", default="1,8,64,256,512", metavar="N,N,...", help="of linears; %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.3, metavar="S", help="for each line; %(default)s"
    )
    parser.add_argument("--cpu-threads", type=int, metavar="N", help="default: all usable cores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(bench_run=run)


def run(arguments: argparse.Namespace) -> int:
    from scalellm.controller.cores import usable_cores

    rows = _rows(arguments.rows)
    formats = _formats(arguments.formats)
    threads = arguments.cpu_threads or usable_cores()
    if not 0 < arguments.seconds <= 60:
        raise ConfigError(f"--seconds: got {arguments.seconds}, allowed: above 0, at most 60")
    if not 1 <= threads <= 1024:
        raise ConfigError(f"--cpu-threads: got {threads}, allowed: 1 to 1024")
    folder = None if arguments.model is None else _folder(arguments.model)

    from scalellm import _core
    from scalellm.bench.kernels import HEAD, Options, caption, cells, run_kernels
    from scalellm.bench.results import check_writable, write_document

    if arguments.json is not None:
        check_writable(arguments.json)
    _core.cpu_start(threads, 0)
    options = Options(
        _shape(folder), tuple(arguments.ops.split(",")), formats, rows, arguments.seconds
    )
    result = run_kernels(options, _say)
    _say(None)
    if result.lines:
        print(caption(result))
    print("\n".join(table([list(HEAD), *(cells(line) for line in result.lines)])))
    if arguments.json is not None:
        write_document(result.to_json(), arguments.json)
    return _EXIT_INTERRUPTED if result.interrupted else _EXIT_OK


def _say(line: "Timed | None") -> None:
    """What was measured last, in a place of its own on a terminal; none clears it."""
    if sys.stderr.isatty():
        text = "" if line is None else f"{line.op} {line.shape}: {line.seconds * 1e3:.3f} ms"
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _folder(model: str) -> Path:
    folder = resolve_model(model, weights=False)
    check_folder(folder, needs_tokenizer=False, needs_weights=False)
    return folder


def _shape(folder: Path | None) -> "ModelShape":
    from scalellm.bench.model_shape import QWEN3_0_6B, ModelShape

    if folder is None:
        return QWEN3_0_6B
    from scalellm.loader.config import read_model_config

    return ModelShape.of_config(folder.name, read_model_config(folder))


def _rows(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(number) for number in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(1 <= rows <= 65536 for rows in found):
        raise ConfigError(f"--rows: got {text!r}, allowed: whole numbers of 1 to 65536, by commas")
    return found


def _formats(text: str) -> "tuple[Precision, ...]":
    from scalellm.bench.model_shape import PRECISIONS

    names = text.split(",")
    if unknown := [name for name in names if name not in PRECISIONS]:
        allowed = ", ".join(PRECISIONS)
        raise ConfigError(f"--formats: got {', '.join(unknown)}, allowed: {allowed}")
    return tuple(name for name in PRECISIONS if name in names)
