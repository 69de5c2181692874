"""Models of other sizes with the demo's tokenizer, for tests whose outcome depends on the size."""

import json
import os
from pathlib import Path

from scalellm.demo import model_folder
from scalellm.loader.digest import weights_digest

# In int8 about 80 MB: large enough that two ranks are quicker than one, and for the packed cache.
LARGER = {"hidden_size": 1024, "num_hidden_layers": 6, "intermediate_size": 3072, "head_dim": 128}


def made_model(folder: Path, **changes: int) -> Path:
    """`folder` with the demo's config but for `changes`, and without weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder() / name).read_bytes())
    config = json.loads((model_folder() / "config.json").read_text())
    for key in ("layer_types", "max_window_layers"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def with_weights(folder: Path) -> Path:
    """The model of `folder` with random weights; returns their file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder / "model.safetensors"


def spoil(weights: Path) -> None:
    """Zeros in place of the weights, where nothing looks that is to tell one file from another."""
    status, digest = weights.stat(), weights_digest(weights.parent, "safetensors", 0)
    content = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    part = (len(content) - begin) // 64  # of which weights_digest reads the first bytes
    for start in range(begin, len(content) - part, part):
        content[start + part // 4 : start + part] = bytes(part - part // 4)
    with weights.open("r+b") as stream:
        stream.write(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_digest(weights.parent, "safetensors", 0) == digest
