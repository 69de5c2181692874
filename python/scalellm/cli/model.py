"""From what a user calls a model to its folder, with every mistake found before anything starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

from scalellm.errors import ModelFileError, ModelNotFoundError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER = "tokenizer.json"
# Runs in a process of its own: the hub's client is large, and the supervisor stays small.
_DOWNLOAD = """
import sys
from scalellm.errors import ScaleLLMError
from scalellm.loader.hub import resolve
try:
    print(resolve(sys.argv[1], sys.argv[2] or None))
except ScaleLLMError as error:
    sys.exit(f"scalellm: {error}")
"""


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of `demo`, of a path, or of a hub id, which is downloaded when needed.

    Raises ModelNotFoundError.
    """
    if model == "demo":
        from scalellm.demo import model_folder

        return model_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelNotFoundError(f"model {model!r} is a file; give its folder")
    if not _HUB_ID.fullmatch(model) or path.parent.is_dir():
        raise ModelNotFoundError(
            f"no model {model!r}: no such folder, and not a hub id of the form owner/name"
        )
    download = subprocess.run(
        [sys.executable, "-P", "-c", _DOWNLOAD, model, revision or ""],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if download.returncode:
        raise ModelNotFoundError(f"cannot get {model!r} from the hub")
    return Path(download.stdout.strip().splitlines()[-1])


def check_folder(folder: Path, needs_tokenizer: bool = False) -> None:
    """Look for the files without which nothing can start.

    Raises ModelNotFoundError when one is missing, ModelFileError when config.json is damaged.
    """
    needed = ["config.json", _TOKENIZER] if needs_tokenizer else ["config.json"]
    for name in needed:
        if not (folder / name).is_file():
            raise ModelNotFoundError(f"{folder} has no {name}")
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{folder / 'config.json'}: {error}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{folder / 'config.json'}: not a JSON object")
