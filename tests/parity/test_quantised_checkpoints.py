"""Checkpoints that come quantised, written here as their formats say, against their numbers."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalellm.errors import ModelFileError, UnsupportedModelError
from scalellm.kernels.linear import MatrixLayout
from scalellm.kernels.linear.cpu import pack, pack_int8
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader.checkpoint import Checkpoint, CheckpointSource
from scalellm.loader.config import read_quantisation
from scalellm.loader.packing import Packing, PackingSource
from scalellm.loader.quantised import Awq, Gptq

from .quantised_checkpoints import awq, config_of, gptq, logits, write, write_plain

TINY = config_of(hidden_size=64, intermediate_size=288, num_attention_heads=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain(TINY, tmp_path_factory.mktemp("plain"))


def int8(weight, channels=True):
    scale = (weight.abs().amax(1, keepdim=True) if channels else weight.abs().max().view(1)) / 127
    scale = scale.bfloat16()
    q = (weight / scale.float()).round().clamp(-127, 127)
    return q * scale.float(), {"weight": q.to(torch.int8), "weight_scale": scale}


def fp8(weight, channels=True):
    scale = (weight.abs().amax(1, keepdim=True) if channels else weight.abs().max()) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    more = {} if channels else {"input_scale": torch.ones(())}
    return q.float() * scale, {"weight": q, "weight_scale": scale, **more}


def fp8_blocks(weight, name="weight_scale_inv"):
    n, k = weight.shape
    rows, columns = -(-n // 128), -(-k // 128)
    scale = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = weight[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            scale[row, column] = block.abs().max() / 448
    whole = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    q = (weight / whole).to(torch.float8_e4m3fn)
    return q.float() * whole, {"weight": q, name: scale}


def compressed(kind, strategy, format, **more):
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS = {
    "compressed int8": (int8, compressed("int", "channel", "int-quantized")),
    "compressed int8 tensor": (
        lambda w: int8(w, channels=False),
        compressed("int", "tensor", "int-quantized"),
    ),
    "compressed fp8": (fp8, compressed("float", "channel", "float-quantized")),
    "compressed fp8 tensor": (
        lambda w: fp8(w, channels=False),
        compressed("float", "tensor", "float-quantized"),
    ),
    "compressed fp8 blocks": (
        lambda w: fp8_blocks(w, "weight_scale"),
        compressed("float", "block", "float-quantized", block_structure=[128, 128]),
    ),
    "block fp8": (
        fp8_blocks,
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "fp8 tensor": (lambda w: fp8(w, channels=False), {"quant_method": "fp8"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "gptq in another order": (
        lambda w: gptq(w, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    ),
    "gptq of 8 bits": (
        lambda w: gptq(w, bits=8),
        {"quant_method": "gptq", "bits": 8, "group_size": 32},
    ),
    "gptq_v2 of one group": (
        lambda w: gptq(w, group=w.shape[1], less=0),
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_is_the_numbers_it_stands_for(plain, tmp_path, name):
    quantised, numbers = write(plain, tmp_path, *FORMATS[name])
    exact, _ = logits(numbers, dtype="float32")
    found, said = logits(quantised, dtype="float32")
    assert "the checkpoint is" in said
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=1e-5)
    packed, _ = logits(quantised, dtype="bfloat16", quantization="int8")
    assert (packed - exact).square().mean().sqrt() < 0.06 * exact.square().mean().sqrt()


def test_int8_of_channels_is_packed_as_it_is(plain, tmp_path):
    """Through bf16 numbers, whole ones would be rounded twice."""
    folder, _ = write(plain, tmp_path, *FORMATS["compressed int8"])
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    weights = torch.cat([tensors[f"{name}.weight"] for name in names])
    scales = torch.cat([tensors[f"{name}.weight_scale"] for name in names]).float().flatten()
    checkpoint = Checkpoint.open(folder, read_quantisation(folder))
    with CheckpointSource(checkpoint, torch.bfloat16, torch.device("cpu")) as source:
        spec = MatrixSpec(tuple((name, 288) for name in names), 64, Use.GATED)
        packed = PackingSource(source, Packing("int8")).matrix(spec)
        numbers = source.matrix(spec)
    assert torch.equal(packed.data, pack_int8(weights, scales, packed.layout).data)
    assert not torch.equal(packed.data, pack(numbers, packed.layout).data)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(32, 64, 1), (70, 36, 1), (96, 1056, 8), (6, 4, 1)])
def test_packing_int8_gives_the_bytes_of_packing_its_numbers(n, k, groups, gated):
    generator = torch.Generator().manual_seed(n)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    weight[:, 0] = 127
    scales = 2.0 ** torch.randint(-9, 3, (n,), generator=generator)
    layout = MatrixLayout("int8", n, k, groups, gated)
    numbers = (weight.float() * scales.unsqueeze(1)).bfloat16()
    packed, expected = pack_int8(weight, scales, layout), pack(numbers, layout)
    values = packed.data.int() - expected.data.int()
    # A scale is 127 s / 127, which may be one bit off s.
    assert int(values.abs().max()) <= 1
    assert int((values != 0).sum()) <= 4 * n * groups


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "does not name"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version gemv"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "gptq of 3 bits"),
        ({"quant_method": "gptq", "bits": 4.0, "group_size": 32}, "gptq of 4.0 bits"),
        (compressed("int", "group", "int-quantized"), "scales by group"),
        (compressed("int", "channel", "pack-quantized"), "format pack-quantized"),
        (compressed("int", "channel", "int-quantized", symmetric=False), "asymmetric"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "blocks of [128]"),
    ],
)
def test_what_is_not_read_is_refused_by_name(plain, tmp_path, config, named):
    quantised, _ = write(plain, tmp_path, int8, config)
    with pytest.raises(UnsupportedModelError) as refusal:
        logits(quantised)
    assert named in str(refusal.value) and "awq (4 bits, version gemm)" in str(refusal.value)


def test_tensors_that_do_not_fit_their_format_are_named(plain, tmp_path):
    quantised, _ = write(plain, tmp_path, *FORMATS["gptq"])
    file = quantised / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj"

    def refused(**changed):
        parts = {f"{name}.{suffix}": tensor for suffix, tensor in changed.items()}
        save_file({**tensors, **parts}, file, {"format": "pt"})
        with pytest.raises(ModelFileError) as refusal:
            logits(quantised)
        return str(refusal.value)

    assert f"{name}.scales" in refused(scales=torch.ones(3, 64, dtype=torch.float16))
    assert f"{name}.bias" in refused(bias=torch.ones(64))
    assert "g_idx names groups" in refused(g_idx=torch.full((288,), 99, dtype=torch.int32))
    name = "model.norm"  # what is no matrix is not quantised
    assert "unexpected model.norm.qweight" in refused(qweight=torch.zeros(8, 64))


@pytest.mark.parametrize("scheme", [Awq(32), Gptq(4, 32, True, ""), Gptq(8, None, False, "")])
def test_sizes_that_words_do_not_divide_have_a_last_word_that_is_not_full(scheme):
    parts = {
        suffix: torch.zeros(of.shapes[0], dtype=torch.int32)
        for suffix, of in scheme.tensors(13, 70).items()
    }
    assert scheme.numbers(parts.__getitem__, 13, 70).shape == (13, 70)
