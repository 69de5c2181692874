"""OpenVINO GenAI's ContinuousBatchingPipeline behind openvino_http.py, weights in int8.

`optimum-cli` exports the bf16 checkpoint. DYNAMIC_QUANTIZATION_GROUP_SIZE=64 is the best of its
documented settings here; the default setting passes no properties.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from peers import weights
from peers.environment import call, python_environment
from peers.system import Launch, System

VERSION = "2026.4.1.0"
_ENVIRONMENT = "openvino"
_FRONT = Path(__file__).with_name("openvino_http.py")
_BEST = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}


def _model(cache: Path, shape: str) -> Path:
    return cache / "models" / f"{shape}-openvino-int8"


def _build(cache: Path, log: Path, shape: str) -> None:
    python = python_environment(cache, _ENVIRONMENT, log)
    model = _model(cache, shape)
    if model.is_dir():
        return
    partial = model.with_name(f".{model.name}.{os.getpid()}")
    export = [str(python.with_name("optimum-cli")), "export", "openvino"]
    source = [
        "--model",
        str(weights.bf16_folder(cache, shape)),
        "--task",
        "text-generation-with-past",
    ]
    call([*export, *source, "--weight-format", "int8", str(partial)], log, {"HF_HUB_OFFLINE": "1"})
    partial.rename(model)


def _launch(cache: Path, port: int, shape: str, properties: Mapping[str, object]) -> Launch:
    python = cache / _ENVIRONMENT / "env" / "bin" / "python"
    # -P: this folder's modules bear the names of packages that the front imports.
    front = (str(python), "-P", str(_FRONT), str(_model(cache, shape)))
    return Launch((*front, str(port), json.dumps(properties)))


def _system(shape: str, name: str, how: str, properties: Mapping[str, object]) -> System:
    return System(
        name,
        f"OpenVINO GenAI {VERSION}, {how}",
        "int8",
        lambda cache, log: _build(cache, log, shape),
        lambda cache, port: _launch(cache, port, shape, properties),
    )


def systems(shape: str) -> tuple[System, ...]:
    return (
        _system(shape, "openvino-best", "best", _BEST),
        _system(shape, "openvino", "default", {}),
    )
