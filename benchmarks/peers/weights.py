"""Models with seeded random weights, as the checkpoints that peers load.

bf16   what every converter starts from; names and shapes as transformers writes them
w8a8   the same weights as compressed-tensors int8: symmetric per output channel, activations
       quantised per token at run time; embedding and output layer stay bf16
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import make_shape

if TYPE_CHECKING:
    from torch import Tensor

QWEN3, MIXTRAL = "qwen3-0.6b", "mixtral-1b"
SHAPES = (QWEN3, MIXTRAL)
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def bf16_folder(cache: Path, shape: str = QWEN3) -> Path:
    """The bf16 checkpoint of a shape below `cache`, written if it is not there yet."""
    folder = cache / "models" / f"{shape}-bf16"
    if not folder.is_dir():
        from peers.random_weights import random_weights

        _write(shape, folder, dict(random_weights(make_shape.SHAPES[shape])), {})
    return folder


def w8a8_folder(cache: Path) -> Path:
    """The Qwen3 shape's compressed-tensors int8 checkpoint below `cache`, written if absent."""
    folder = cache / "models" / f"{QWEN3}-w8a8"
    if not folder.is_dir():
        from peers.random_weights import quantise_channels, random_weights

        tensors: dict[str, Tensor] = {}
        for name, weight in random_weights(make_shape.SHAPES[QWEN3]):
            if name.endswith("_proj.weight"):
                scale_name = name.removesuffix("weight") + "weight_scale"
                tensors[name], tensors[scale_name] = quantise_channels(weight)
            else:
                tensors[name] = weight
        _write(QWEN3, folder, tensors, {"quantization_config": _W8A8})
    return folder


def _write(shape: str, folder: Path, tensors: "dict[str, Tensor]", config: dict[str, Any]) -> None:
    """Write beside `folder` and rename, so that a folder that is there is whole."""
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    make_shape.write(shape, partial)
    path = partial / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **config}, indent=2))
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(folder)
