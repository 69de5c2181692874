"""Convert a checkpoint to GGUF with llama.cpp's own converter.

    python llama_convert.py LLAMA_CPP_SOURCE MODEL OUTPUT

Runs in a peer's environment. The converter knows tokenizers by what they make of one text, and
refuses those it does not know; this model's, made for it, is byte-level like GPT-2's. It has no
merges, without which llama.cpp loads no such tokenizer: it gets one that makes no token.
"""

import importlib
import sys
from typing import Any


def main() -> None:
    source, model, output = sys.argv[1:]
    sys.path.insert(0, source)
    converter = importlib.import_module("convert_hf_to_gguf")
    base = importlib.import_module("conversion.base")
    write_vocabulary = base.TextModel._set_vocab_gpt2

    def write_vocabulary_and_merge(model: Any) -> None:
        write_vocabulary(model)
        model.gguf_writer.add_token_merges(["a b"])

    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    base.TextModel._set_vocab_gpt2 = write_vocabulary_and_merge
    sys.argv = ["convert_hf_to_gguf", model, "--outfile", output, "--outtype", "bf16"]
    converter.main()


if __name__ == "__main__":
    main()
