"""From what a user calls a model to its folder, with every mistake found before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

from scalellm.errors import ModelFileError, ModelNotFoundError

# Runs in a process of its own: the hub's client is large, and the supervisor stays small.
_DOWNLOAD = """
import json, sys
from scalellm.errors import ScaleLLMError
from scalellm.loader.hub import resolve_model
model, revision, weights = json.loads(sys.argv[1])
try:
    answer = {"path": str(resolve_model(model, revision, weights=weights))}
except ScaleLLMError as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
"""


def resolve_model(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of `demo`, of a path, or of a hub id, which is downloaded when needed.

    `weights` False leaves them out of a download. Raises ModelNotFoundError.
    """
    if model == "demo":
        from scalellm.demo import model_folder

        return model_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelNotFoundError(f"model {model!r} is a file; give its folder")
    download = subprocess.run(
        [sys.executable, "-P", "-c", _DOWNLOAD, json.dumps([model, revision, weights])],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(download.stdout.strip().rpartition("\n")[2])
    except ValueError:
        raise ModelNotFoundError(f"the download of {model!r} ended without an answer") from None
    if "error" in answer:
        raise ModelNotFoundError(answer["error"])
    return Path(answer["path"]).resolve()


def check_folder(folder: Path, needs_tokenizer: bool, needs_weights: bool) -> None:
    """Look for the files without which nothing can start.

    Raises ModelNotFoundError when one is missing, ModelFileError when config.json is damaged.
    """
    needed = ["config.json", "tokenizer.json"] if needs_tokenizer else ["config.json"]
    for name in needed:
        if not (folder / name).is_file():
            raise ModelNotFoundError(f"model folder {folder} has no {name}")
    if needs_weights and not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"model folder {folder} has no *.safetensors; --load-format dummy makes random weights"
        )
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{folder / 'config.json'}: {error}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{folder / 'config.json'}: not a JSON object")
