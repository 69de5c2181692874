"""llama.cpp's own server, built from the source that llama-cpp-python's source package carries.

Q8_0 and Q4_0 are made by its converter and its llama-quantize. Its server has a fixed number of
slots, each a share of the context; here one for each of 64 requests, with room for 256 tokens.
"""

import os
import shutil
import tarfile
from pathlib import Path

from peers import transformers_serve, weights
from peers.environment import call
from peers.system import Launch, PeerError, System

VERSION = "0.3.36"  # of llama-cpp-python, whose vendored llama.cpp names itself by its commit only
_FOLDER = "llama.cpp"
_INSIDE = "vendor/llama.cpp"
_CONVERT = Path(__file__).with_name("llama_convert.py")
_SLOTS = 64
_TOKENS_PER_SLOT = 256
_SETTINGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF")
_LEFT_OUT = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")
_TARGETS = ("llama-server", "llama-quantize")


def _source(cache: Path, log: Path) -> Path:
    """The folder of llama.cpp's source, from the registry's source package."""
    source = cache / _FOLDER / f"source-{VERSION}"
    if source.is_dir():
        return source
    download = cache / _FOLDER / "download"
    pip = [str(transformers_serve.python(cache, log)), "-m", "pip", "download", "--no-deps"]
    wanted = ["--no-binary", ":all:", f"llama-cpp-python=={VERSION}", "-d", str(download)]
    call([*pip, *wanted], log)
    archive = next(download.glob("*.tar.gz"), None)
    if archive is None:
        raise PeerError("llama-cpp-python: the registry gave no source package")
    unpacked = cache / _FOLDER / f".unpacked.{os.getpid()}"
    with tarfile.open(archive) as packed:
        packed.extractall(unpacked, filter="data")
    next(unpacked.glob(f"*/{_INSIDE}")).rename(source)
    shutil.rmtree(unpacked)
    shutil.rmtree(download)
    return source


def _binary(cache: Path, name: str) -> Path:
    return cache / _FOLDER / f"build-{VERSION}" / "bin" / name


def _model(cache: Path, shape: str, kind: str) -> Path:
    return cache / "models" / f"{shape}-{kind.lower()}.gguf"


def _build(cache: Path, log: Path, shape: str, kind: str) -> None:
    source = _source(cache, log)
    if not all(_binary(cache, target).exists() for target in _TARGETS):
        cmake = shutil.which("cmake")
        if cmake is None:
            raise PeerError("cmake is not installed")
        build = cache / _FOLDER / f"build-{VERSION}"
        left_out = [f"-D{name}=OFF" for name in _LEFT_OUT]
        call([cmake, "-S", str(source), "-B", str(build), *_SETTINGS, *left_out], log)
        jobs = str(len(os.sched_getaffinity(0)))
        call([cmake, "--build", str(build), "-j", jobs, "--target", *_TARGETS], log)
    if not _model(cache, shape, "bf16").exists():
        partial = _model(cache, shape, f"bf16.{os.getpid()}")
        convert = [str(transformers_serve.python(cache, log)), "-P", str(_CONVERT), str(source)]
        call([*convert, str(weights.bf16_folder(cache, shape)), str(partial)], log)
        partial.rename(_model(cache, shape, "bf16"))
    if not _model(cache, shape, kind).exists():
        partial = _model(cache, shape, f"{kind}.{os.getpid()}")
        quantize = str(_binary(cache, "llama-quantize"))
        call([quantize, str(_model(cache, shape, "bf16")), str(partial), kind], log)
        partial.rename(_model(cache, shape, kind))


def _launch(cache: Path, port: int, shape: str, kind: str) -> Launch:
    argv = [str(_binary(cache, "llama-server")), "--model", str(_model(cache, shape, kind))]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--alias", "peer", "--no-ui"]
    argv += ["--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * _TOKENS_PER_SLOT)]
    argv += ["--threads", str(len(os.sched_getaffinity(0)))]
    return Launch(tuple(argv), ready_path="/health")


def _system(shape: str, kind: str) -> System:
    return System(
        f"llama.cpp-{kind.lower()}",
        f"llama.cpp of llama-cpp-python {VERSION}",
        kind,
        lambda cache, log: _build(cache, log, shape, kind),
        lambda cache, port: _launch(cache, port, shape, kind),
    )


def systems(shape: str) -> tuple[System, ...]:
    return (_system(shape, "Q8_0"), _system(shape, "Q4_0"))
