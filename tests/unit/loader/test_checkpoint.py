"""Weights: read rightly, and every way to be damaged has an answer that names it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from scalellm.config import EngineConfig
from scalellm.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor
from scalellm.loader.checkpoint import read_header

BATCH = Batch((Span([1, 5, 9, 30], 0, [0], 4),))


def load(folder, **settings):
    config = EngineConfig(
        model_path=folder, device="cpu", kv_cache_memory_bytes=1 << 20, **settings
    )
    return SingleExecutor.load(config)


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_missing_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load(tmp_path)


def test_folder_without_weights_mentions_dummy(make_folder):
    with pytest.raises(ModelNotFoundError, match="--load-format dummy"):
        load(make_folder(weights=None))


def test_pickles_only_are_refused(make_folder):
    folder = make_folder(weights=None)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="pickle"):
        load(folder)


def test_sharded_equals_single(make_folder):
    single = load(make_folder()).forward(BATCH)
    folder = make_folder(shards=3)
    (folder / "model.safetensors").unlink()
    assert torch.equal(load(folder).forward(BATCH), single)


def test_missing_shard_is_named(make_folder):
    folder = make_folder(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="lacks 1 of 3 shards: model-00002-of-00003"):
        load(folder)


def test_index_promising_a_tensor_that_no_shard_has(make_folder):
    folder = make_folder(shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(shard)
    tensors.pop("model.embed_tokens.weight")
    save_file(tensors, shard)
    with pytest.raises(ModelFileError, match=r"promises model\.embed_tokens\.weight"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 5, 40, 0.5, 0.999])
def test_truncated_file_says_how_much_is_missing(make_folder, kept):
    file = make_folder() / "model.safetensors"
    data = file.read_bytes()
    end = int(len(data) * kept) if isinstance(kept, float) else kept
    file.write_bytes(data[:end])
    with pytest.raises(ModelFileError, match="is truncated") as refused:
        load(file.parent)
    assert str(end) in str(refused.value)


def test_trailing_bytes(make_folder):
    file = make_folder() / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ModelFileError, match="has extra bytes"):
        load(file.parent)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": 3}',
        b"\xff\xfe\x00",
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_headers_that_make_no_sense(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelFileError, match="is no safetensors file"):
        read_header(file)


def test_a_header_beyond_safetensors_limit_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)
    with pytest.raises(ModelFileError, match="a header of 200000000 bytes"):
        read_header(file)


def test_tensors_that_overlap_in_the_file_are_refused_by_name(make_folder):
    file = make_folder() / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    norms = ["model.norm.weight", "model.layers.0.input_layernorm.weight"]
    header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
    spoilt = json.dumps(header).encode()
    file.write_bytes(len(spoilt).to_bytes(8, "little") + spoilt + data[8 + length :])
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        load(file.parent)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", 3, ["x"]]
)
def test_an_index_cannot_name_files_outside_its_folder(make_folder, name):
    folder = make_folder(weights=None)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="no file of the folder"):
        load(folder)


def test_header_whose_shape_and_bytes_disagree(tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelFileError, match=r"a has 8 bytes, which is not F32 \[3\]"):
        read_header(file)


def test_tensors_of_another_model_are_all_named(make_folder):
    weights = weights_of(make_folder())
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 16)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    with pytest.raises(ModelFileError) as refused:
        load(make_folder(weights))
    message = str(refused.value)
    assert "missing model.norm.weight" in message
    assert "unexpected model.layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.1.mlp.up_proj.weight ([8, 16], config.json asks for [24, 16])" in message


def test_many_missing_tensors_are_counted(make_folder):
    with pytest.raises(ModelFileError, match=r"missing .* and 4 more"):
        load(make_folder(num_hidden_layers=3))


def test_tied_embeddings_may_be_stored_twice(make_folder):
    weights = weights_of(make_folder())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    twice = load(make_folder(weights, tie_word_embeddings=True))
    assert twice.model_config.tie_word_embeddings
    del weights["lm_head.weight"]
    once = load(make_folder(weights, tie_word_embeddings=True))
    assert torch.equal(once.forward(BATCH), twice.forward(BATCH))
    with pytest.raises(ModelFileError, match=r"missing lm_head\.weight"):
        load(make_folder(weights, tie_word_embeddings=False))


def test_an_output_layer_that_differs_from_the_embedding_counts_as_in_transformers(make_folder):
    from transformers import AutoModelForCausalLM

    folder = make_folder(tie_word_embeddings=True)
    ids = torch.tensor([BATCH.spans[0].token_ids])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0]
    torch.testing.assert_close(load(folder).forward(BATCH), expected, atol=1e-4, rtol=1e-4)


def test_old_rotary_buffers_are_ignored(make_folder):
    weights = weights_of(make_folder())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    load(make_folder(weights))


def test_stored_types_are_converted(make_folder):
    weights = weights_of(make_folder())
    exact = load(make_folder(weights), dtype="float32").forward(BATCH)
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    narrow = load(make_folder(halves), dtype="float32")
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.forward(BATCH), exact, atol=0.1, rtol=0.05)


def test_quantised_tensors_without_a_config_are_refused(make_folder):
    weights = weights_of(make_folder())
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight is stored as I8"):
        load(make_folder(weights))
