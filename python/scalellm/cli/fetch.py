"""`scalellm fetch MODEL`: have a model's files here before they are needed."""

import argparse
import shutil
from pathlib import Path

from scalellm.cli.model import check_folder, resolve_model
from scalellm.errors import ConfigError

_WEIGHTS = ".safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or `demo`")
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--no-weights", action="store_true", help="only what a gateway needs: tokenizer, template"
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help="copy the files there; default: leave them in the cache"
    )


def run(arguments: argparse.Namespace) -> int:
    weights = not arguments.no_weights
    folder = resolve_model(arguments.model, arguments.revision, weights)
    check_folder(folder, needs_tokenizer=True, needs_weights=weights)
    if arguments.to is not None:
        folder = copy(folder, Path(arguments.to), weights)
    print(folder)
    return 0


def copy(folder: Path, to: Path, weights: bool) -> Path:
    """Copy a model's files, each whole or not at all. Raises ConfigError."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            if file.is_dir() or (not weights and _WEIGHTS in file.name):
                continue
            part = to / (file.name + ".part")
            shutil.copyfile(file, part)
            part.replace(to / file.name)
    except OSError as error:
        raise ConfigError(f"to: {to}: {error}") from None
    return to
