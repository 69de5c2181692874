"""Write a model folder without weights, for `--load-format dummy`.

    python benchmarks/make_shape.py qwen3-0.6b /tmp/qwen3-0.6b
    scalellm serve /tmp/qwen3-0.6b --load-format dummy --dtype bfloat16

The folder holds config.json with the shape's real sizes, and a byte-level tokenizer made here:
every byte is a token, and the rest of the vocabulary is filled with pseudo-words that no text is
encoded to, so that every id a random model answers with decodes to some text.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_QWEN3_0_6B: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
# No published size: small enough for 64 streams on two cores, large enough for reading the weights
# to be most of what one stream waits for.
_QWEN3_0_3B = {**_QWEN3_0_6B, "vocab_size": 32768, "num_hidden_layers": 16}
_MIXTRAL_8X7B: Mapping[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_MIXTRAL_1B = {
    **_MIXTRAL_8X7B,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_EXPERTS = ("num_local_experts", "num_experts_per_tok")
# The dense model whose layers compute what two of mixtral-1b's experts compute.
_MIXTRAL_1B_ACTIVE = {
    **{name: value for name, value in _MIXTRAL_1B.items() if name not in _EXPERTS},
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "intermediate_size": 2 * 2048,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _QWEN3_0_6B,
    "qwen3-0.3b": _QWEN3_0_3B,
    "mixtral-8x7b": _MIXTRAL_8X7B,
    "mixtral-1b": _MIXTRAL_1B,
    "mixtral-1b-active": _MIXTRAL_1B_ACTIVE,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids: 256 bytes, pseudo-words, then SPECIAL."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = islice(pseudo_words(), vocab_size - len(alphabet) - len(SPECIAL))
    vocab = {token: id for id, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def pseudo_words() -> Iterator[str]:
    """Distinct pronounceable words with a leading space, in byte-level spelling."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    for length in (2, 3, 4):
        for parts in product(syllables, repeat=length):
            yield "\u0120" + "".join(parts)


def write(shape: str, folder: Path) -> None:
    """Write the files of `shape` into `folder`, which is made."""
    write_config(SHAPES[shape], folder)


def write_config(shape: Mapping[str, Any], folder: Path) -> None:
    """The same for a shape of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(shape)
    tokenizer = make_tokenizer(config["vocab_size"])
    config["bos_token_id"] = tokenizer.token_to_id(SPECIAL[0])
    config["eos_token_id"] = tokenizer.token_to_id(SPECIAL[2])
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[2],
            "model_max_length": config["max_position_embeddings"],
            "chat_template": TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model folder without weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.shape, arguments.folder)
    print(f"{arguments.folder}: serve it with --load-format dummy")


if __name__ == "__main__":
    main()
