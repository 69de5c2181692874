"""Writes small checkpoints as quantisers do, and runs them."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from scalellm.config import EngineConfig
from scalellm.executor.batch import Batch, Span
from scalellm.executor.single import SingleExecutor

IDS = [(7 * i + i * i) % 211 for i in range(40)]


def config_of(**sizes):
    """A small model of heads of 32 numbers, with an output layer of its own."""
    return Qwen3Config(
        **sizes,
        vocab_size=211,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def write_plain(config, folder, dtype=torch.float32):
    """A random model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            if name.endswith("v_proj.weight"):
                parameter[:, :32].abs_()  # a group whose zero is 0
    model.to(dtype).save_pretrained(folder)
    return folder


def words_of(parts, order, bits=4):
    """[.., 32 / bits] whole numbers to int32 words, part order[i] at place i from the lowest."""
    words = torch.zeros(parts.shape[:-1], dtype=torch.int64)
    for place, part in enumerate(order):
        words |= parts[..., part].long() << (bits * place)
    return words.to(torch.uint32).view(torch.int32)


def whole_numbers(weight, group, bits, symmetric=False):
    """A scale and zero for each group of inputs: [n, k], [n, groups] twice."""
    n, k = weight.shape
    grouped = weight.view(n, k // group, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high * 2**bits / (2**bits - 2)  # its zero is half of all numbers
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    q = (grouped / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return q.view(n, k), scale, zero


def of_groups(q, scale, zero):
    n, k = q.shape
    grouped = q.view(n, scale.shape[1], -1)
    return ((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(n, k)


def awq(weight, group=32):
    q, scale, zero = whole_numbers(weight, group, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return of_groups(q, scale, zero), {
        "qweight": words_of(q.t().unflatten(-1, (-1, 8)), order),
        "qzeros": words_of(zero.t().unflatten(-1, (-1, 8)), order),
        "scales": scale.t().half(),
    }


def gptq(weight, bits=4, group=32, less=1, shuffled=False, symmetric=False):
    n, k = weight.shape
    inputs = torch.randperm(k, generator=torch.Generator().manual_seed(k)) if shuffled else range(k)
    inputs = torch.as_tensor(inputs)
    q, scale, zero = whole_numbers(weight[:, inputs], group, bits, symmetric)
    back = inputs.argsort()
    packed = 32 // bits
    return of_groups(q, scale, zero)[:, back], {
        "qweight": words_of(
            q[:, back].t().unflatten(0, (-1, packed)).transpose(1, 2), range(packed), bits
        ),
        # Writers take 1 from every number of a whole word at once: a zero of 0 borrows.
        "qzeros": words_of(zero.t().unflatten(-1, (-1, packed)), range(packed), bits)
        - less * sum(2**place for place in range(0, 32, bits)),
        "scales": scale.t().half(),
        "g_idx": (back // group).int(),
        "bias": torch.zeros(n),
    }


def write(plain, folder, writer, config):
    """`plain` quantised in `folder` / quantised, and the numbers that this is in / numbers."""
    quantised, numbers = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        quantised[name] = numbers[name] = tensor
        if name.endswith("_proj.weight"):
            numbers[name], parts = writer(tensor.float())
            del quantised[name]
            for suffix, part in parts.items():
                quantised[name.removesuffix("weight") + suffix] = part.contiguous()
    for kind, tensors in (("quantised", quantised), ("numbers", numbers)):
        (folder / kind).mkdir()
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / kind / "model.safetensors", {"format": "pt"})
        shutil.copy(plain / "config.json", folder / kind)
    fields = json.loads((plain / "config.json").read_text())
    fields["quantization_config"] = config
    (folder / "quantised" / "config.json").write_text(json.dumps(fields))
    return folder / "quantised", folder / "numbers"


def logits(folder, **settings):
    said = []
    executor = SingleExecutor.load(
        EngineConfig(
            model_path=folder,
            device="cpu",
            kv_cache_memory_bytes=4 << 20,
            packed_cache="none",
            **settings,
        ),
        lambda phase, _seconds: said.append(phase),
    )
    span = Span(IDS, 0, range(-(-len(IDS) // executor.block_size)), len(IDS))
    return executor.forward(Batch((span,))).clone(), " ".join(said)
