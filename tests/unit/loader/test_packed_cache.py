"""Packed weights as files: right, shared, rebuilt when damaged, bounded; and never in the way."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor
from scalellm.kernels.linear import PackedMatrix
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader import load
from scalellm.loader.packed_cache import PackedCache, UncachedError, cache_folder
from scalellm.loader.packed_file import (
    DamagedFileError,
    MappedWeights,
    MatrixPart,
    TensorPart,
    file_bytes,
)
from scalellm.loader.packing import Packing, PackingSource
from scalellm.loader.sources import DummySource, InventorySource

BF16 = torch.bfloat16
TABLE, BIAS = "embed.weight", "q.bias"
TIED = MatrixSpec((("head", 70),), 64, Use.OUTPUT)
GATED = MatrixSpec((("gate", 48), ("up", 48)), 64, Use.GATED)


def plan(quantization="int8"):
    inventory = InventorySource(BF16, Packing(quantization))
    table = inventory.table(TABLE, 70, 64)
    inventory.fill(torch.empty(9, device="meta"), BIAS)
    inventory.matrix(GATED)
    inventory.matrix(TIED, table)
    return inventory.plan


class Sources:
    """Opens sources of random weights and counts them."""

    def __init__(self, quantization="int8", wait_s=0.0):
        self.opened = 0
        self._source = PackingSource(
            DummySource(0, BF16, torch.device("cpu")), Packing(quantization)
        )
        self._wait_s = wait_s

    def __call__(self):
        return self

    def __enter__(self):
        self.opened += 1
        time.sleep(self._wait_s)
        return self._source

    def __exit__(self, *_):
        pass


@pytest.fixture
def cache(tmp_path):
    return PackedCache(tmp_path / "packed", limit_bytes=1 << 30)


def take(cache, sources, name="m", identity=(1,)):
    return cache.weights(name, identity, plan(), BF16, sources)


def test_mapped_weights_are_what_the_source_gives(cache):
    sources = Sources()
    mapped, path, written = take(cache, sources)
    assert written and path.parent == cache.folder
    source = sources._source
    table = source.table(TABLE, 70, 64)
    assert torch.equal(mapped.table(TABLE, 70, 64), table)
    bias = torch.empty(9, dtype=BF16)
    mapped.fill(bias, BIAS)
    assert torch.equal(bias, torch.zeros(9, dtype=BF16))
    for spec, tied in ((GATED, None), (TIED, table)):
        found, expected = mapped.matrix(spec, tied), source.matrix(spec, tied)
        assert isinstance(found, PackedMatrix) and found.layout == expected.layout
        assert torch.equal(found.data, expected.data)
        assert found.data.data_ptr() % 4096 == 0


def test_second_time_nothing_is_packed(cache):
    take(cache, Sources())
    sources = Sources()
    _, _, written = take(cache, sources)
    assert not written and sources.opened == 0


def test_other_identity_or_layout_is_another_file(cache):
    paths = {
        take(cache, Sources())[1],
        take(cache, Sources(), identity=(2,))[1],
        cache.weights("m", (1,), plan("int4"), BF16, Sources("int4"))[1],
        take(cache, Sources(), name="n")[1],
    }
    assert len(paths) == 4


def damage_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no header": lambda path: damage_byte(path, 3),
    "header": lambda path: damage_byte(path, 17),
    "first part": lambda path: damage_byte(path, 4096),
    "a matrix": lambda path: damage_byte(path, 20480 + 1000),
    "index": lambda path: damage_byte(path, path.stat().st_size - 1),
    "zeros after a power cut": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_written_anew(cache, damage):
    mapped, path, _ = take(cache, Sources())
    right = path.read_bytes()
    kept = mapped.matrix(GATED).data.clone()
    copy = path.with_name("copy")
    copy.write_bytes(right)
    copy.rename(path)  # what is mapped stays as it was
    DAMAGES[damage](path)
    with pytest.raises(DamagedFileError):
        MappedWeights(path, plan(), BF16)
    sources = Sources()
    again, _, written = take(cache, sources)
    assert written and sources.opened == 1
    assert path.read_bytes() == right
    assert torch.equal(again.matrix(GATED).data, kept)
    assert torch.equal(mapped.matrix(GATED).data, kept)


def test_file_of_other_parts_is_refused(cache):
    _, path, _ = take(cache, Sources())
    with pytest.raises(DamagedFileError, match="other parts"):
        MappedWeights(path, plan()[1:], BF16)


def test_model_that_asks_otherwise_than_planned_is_refused(cache):
    mapped, _, _ = take(cache, Sources())
    with pytest.raises(TypeError):
        mapped.matrix(TIED, None)


def test_replicas_that_start_together_pack_once(cache):
    """Locks of this kind are between open files: threads stand for processes."""
    sources = [Sources(wait_s=0.3) for _ in range(3)]
    with ThreadPoolExecutor(len(sources)) as replicas:
        found = list(replicas.map(lambda source: take(cache, source)[2], sources))
    assert sorted(found) == [False, False, True]
    assert sum(source.opened for source in sources) == 1
    assert [file.suffix for file in cache.folder.iterdir()] == [".packed"]


def test_writer_that_fails_leaves_nothing_that_is_used(cache):
    class Failing(Sources):
        def __enter__(self):
            super().__enter__()
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        take(cache, Failing())
    assert not list(cache.folder.glob("*.packed"))
    _, _, written = take(cache, Sources())
    assert written
    assert not list(cache.folder.glob("*.partial"))


def test_least_recently_used_files_give_way(tmp_path):
    size = take(PackedCache(tmp_path, 1 << 30), Sources())[1].stat().st_size
    next(tmp_path.iterdir()).unlink()
    cache = PackedCache(tmp_path, limit_bytes=int(2.5 * size))
    paths = {}
    for age, name in ((300, "a"), (200, "b")):
        paths[name] = take(cache, Sources(), name)[1]
        os.utime(paths[name], (time.time() - age,) * 2)
    take(cache, Sources(), "a")  # used again
    paths["c"] = take(cache, Sources(), "c")[1]
    assert {name: path.exists() for name, path in paths.items()} == {
        "a": True,
        "b": False,
        "c": True,
    }


def test_model_larger_than_the_cache_is_no_file(tmp_path):
    with pytest.raises(UncachedError, match="--packed-cache-size"):
        take(PackedCache(tmp_path, limit_bytes=1000), Sources())


def test_disk_is_not_filled(cache, monkeypatch):
    needed = file_bytes(plan())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * needed - 1))
    with pytest.raises(UncachedError, match="MiB free"):
        take(cache, Sources())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * needed))
    assert take(cache, Sources())[1].exists()


def test_folder_that_cannot_be_is_no_obstacle(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UncachedError, match="file"):
        take(PackedCache(tmp_path / "file" / "packed", 1 << 30), Sources())


def test_folder_of_the_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(None) == Path("/somewhere/scalellm/packed")
    assert cache_folder("none") is None
    assert cache_folder("/else") == Path("/else")


def test_parts_say_how_large_they_are():
    parts = {part.name: part for part in plan()}
    assert isinstance(parts[TABLE], TensorPart) and parts[TABLE].num_bytes == 70 * 64 * 2
    assert isinstance(parts["gate+up"], MatrixPart)
    assert parts["head"].tied == TABLE


# ------------------------------------------------------------------ in a whole model


def logits(config):
    phases = []
    executor = SingleExecutor.load(config, lambda phase, _: phases.append(phase))
    (weights,) = [phase for phase in phases if "weights:" in phase]
    return executor.forward(Batch((Span([1, 2, 3], 0, [0], 3),))), weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_model_answers_the_same_packed_mapped_and_in_memory(
    make_folder, tmp_path, monkeypatch, quantization, tied
):
    monkeypatch.setattr(load, "LEAST_BYTES", 0)
    config = {
        "model_path": make_folder(weights=None, tie_word_embeddings=tied),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "device": "cpu",
        "quantization": quantization,
        "kv_cache_memory_bytes": 1 << 20,
    }
    folder = str(tmp_path / "packed")
    plain, said = logits(EngineConfig(**config, packed_cache="none"))
    assert said.endswith("in memory")
    packed, said = logits(EngineConfig(**config, packed_cache=folder))
    assert "packed into" in said
    mapped, said = logits(EngineConfig(**config, packed_cache=folder))
    assert "mapped from" in said
    assert torch.equal(plain, packed) and torch.equal(plain, mapped)


def test_changed_checkpoint_is_packed_again(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "LEAST_BYTES", 0)
    config = EngineConfig(
        model_path=make_folder(),
        dtype="bfloat16",
        device="cpu",
        quantization="int8",
        kv_cache_memory_bytes=1 << 20,
        packed_cache=str(tmp_path / "packed"),
    )
    _, said = logits(config)
    assert "packed into" in said
    weights = config.model_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-20:] = bytes(20)  # same size, same header
    weights.write_bytes(data)
    _, said = logits(config)
    assert "packed into" in said
    os.utime(weights, ns=(0, 0))
    _, said = logits(config)
    assert "packed into" in said
    _, said = logits(config)
    assert "mapped from" in said


def test_small_models_make_no_files(make_folder, tmp_path):
    config = EngineConfig(
        model_path=make_folder(),
        dtype="bfloat16",
        device="cpu",
        kv_cache_memory_bytes=1 << 20,
        packed_cache=str(tmp_path / "packed"),
    )
    _, said = logits(config)
    assert said.endswith("in memory") and not (tmp_path / "packed").exists()


def test_cache_that_fails_is_named_and_does_without(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "LEAST_BYTES", 0)
    (tmp_path / "file").touch()
    config = EngineConfig(
        model_path=make_folder(),
        dtype="bfloat16",
        device="cpu",
        kv_cache_memory_bytes=1 << 20,
        packed_cache=str(tmp_path / "file" / "packed"),
    )
    _, said = logits(config)
    assert "in memory, as the packed cache cannot have them" in said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "int8"),
        ({"quantization": "none"}, "none"),
        ({"quantization": "int4"}, "int4"),
        ({"dtype": "bfloat16"}, "none"),
        ({"dtype": "float32"}, "none"),
        ({"kv_cache_dtype": "float32"}, "none"),
    ],
)
def test_auto_is_int8_where_nothing_says_otherwise(make_folder, settings, expected):
    phases = []
    config = EngineConfig(
        model_path=make_folder(weights=None, dtype="bfloat16"),
        load_format="dummy",
        device="cpu",
        kv_cache_memory_bytes=1 << 20,
        **settings,
    )
    executor = SingleExecutor.load(config, lambda phase, _: phases.append(phase))
    assert executor.quantization == expected
    assert ("as --quantization auto chooses" in phases[0]) == (settings == {})
