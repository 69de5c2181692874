"""Which weights a folder has, without reading all of them. This module imports no torch."""

import hashlib
from pathlib import Path

# Read from a shard for its digest: enough to tell a model from one that was trained on from it.
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def weights_digest(folder: Path, load_format: str, seed: int) -> str:
    """Hex SHA-256 that names the weights without reading all of them.

    Over config.json and each shard's name, size, header (names, shapes, types, offsets) and
    samples at equal distances; for dummy weights over config.json and the seed.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if load_format == "dummy":
        digest.update(f"dummy {seed}".encode())
        return digest.hexdigest()
    for shard in sorted(folder.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size} ".encode())
        with shard.open("rb") as stream:
            length = min(int.from_bytes(stream.read(8), "little"), size)
            digest.update(stream.read(length))
            for sample in range(_SAMPLES):
                stream.seek(8 + length + (size - 8 - length) * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
