"""The weights that every system gets, what is installed, and what can be chosen."""

import re
from pathlib import Path

import bench_peers
import make_shape
import peers
import pytest
import torch
from peers import weights
from peers.random_weights import quantise_channels, random_weights
from peers.system import PeerError

TINY = {
    **make_shape.SHAPES["qwen3-0.6b"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_MIXTRAL = {
    **make_shape.SHAPES["mixtral-1b"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PINS = sorted((Path(peers.__file__).parent / "pins").glob("*.txt"))


def test_weights_have_the_names_and_shapes_of_transformers() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**TINY))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del wanted["lm_head.weight"]  # the embedding
    assert {name: tuple(weight.shape) for name, weight in random_weights(TINY)} == wanted


def test_experts_are_those_that_scalellm_loads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from scalellm import LLM, SamplingParams

    make_shape.write_config(TINY_MIXTRAL, tmp_path)
    save_file(dict(random_weights(TINY_MIXTRAL)), tmp_path / "model.safetensors")
    llm = LLM(str(tmp_path), max_model_len=64)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    (answer,) = llm.generate(["a"], params)
    assert len(answer.outputs[0].token_ids) == 3


def test_weights_are_the_same_every_time() -> None:
    pairs = zip(random_weights(TINY), random_weights(TINY), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)


def test_int8_weights_are_within_half_a_step() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    quantised, scale = quantise_channels(weight)
    assert quantised.dtype == torch.int8 and scale.shape == (5, 1)
    error = (quantised.float() * scale.float() - weight.float()).abs()
    # The scale itself is rounded to bf16, whose steps are 2^-8 of it.
    assert torch.all(error <= scale.float() * (0.5 + 127 / 256))


@pytest.mark.parametrize("path", PINS, ids=lambda path: path.stem)
def test_pins_are_names_and_versions_only(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)]
    names = [line.partition("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))


def test_every_environment_has_pins() -> None:
    assert {path.stem for path in PINS} >= {"litellm", "openvino", "smg", "transformers", "vllm"}


def test_names_are_unique_and_unknown_ones_are_refused_with_the_known() -> None:
    for shape in weights.SHAPES:
        names = [system.name for system in bench_peers.choose(None, shape)]
        assert len(names) == len(set(names))
    assert [system.name for system in bench_peers.choose("vllm,scalellm")] == ["scalellm", "vllm"]
    with pytest.raises(PeerError, match=r"got vlm, x; known: .*vllm"):
        bench_peers.choose("vlm,x,vllm")
