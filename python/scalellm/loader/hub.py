"""Hub ids: download what serving needs, once, into the Hugging Face cache. Imports no torch."""

import os
import re
from pathlib import Path

from scalellm.errors import ModelNotFoundError

# Weights in safetensors, configuration, tokenizer and chat template; no pickles, no other formats.
FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model", "*.txt")
DUPLICATES = ("consolidated*", "original/*", "onnx/*", "*.onnx.json")
WEIGHTS = "*.safetensors*"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    model: str, revision: str | None = None, token: str | None = None, weights: bool = True
) -> Path:
    """The folder of a model given as a folder or hub id; downloads with progress bars.

    `revision`: a branch, tag or commit. `token`: else HF_TOKEN or the one `hf auth login` stored.
    `weights` False leaves them out, for dummy weights. Raises ModelNotFoundError, whose message
    says how to proceed.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = model.startswith((".", "~")) or folder.is_absolute() or model.count("/") > 1
    if looks_like_path or not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(f"model folder {folder} does not exist")
    return _download(model, revision, token, weights)


def _download(model: str, revision: str | None, token: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{model}"
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                token=token,
                allow_patterns=list(FILES),
                ignore_patterns=[*DUPLICATES, *(() if weights else (WEIGHTS,))],
            )
        )
    except GatedRepoError:
        raise ModelNotFoundError(
            f"{model} is gated: accept its terms at {page}, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"{model} has no revision {revision!r}; see {page}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelNotFoundError(
            f"there is no folder {model!r} here and no model {model!r} on the hub; "
            "a private one needs `hf auth login` or HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        reason = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({error})"
        raise ModelNotFoundError(
            f"{model} is neither a folder here nor in the cache, and {reason}; download it where "
            f"there is a network (`hf download {model}`) and give the folder instead"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"downloading {model} failed: {error}; if the network is down, give a folder instead"
        ) from None
