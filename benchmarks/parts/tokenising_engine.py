"""The real engine loop, which also handles text if asked, as engines in Python often do.

    python tokenising_engine.py --listen ADDRESS --model FOLDER [--step-ms MS] [--text]

The loop, its scheduler and its listener are ScaleLLM's own. A step takes a set time if one is
given, and computes the model if not. With `--text`
the loop's thread encodes each prompt when it comes (a text of as many tokens) and decodes each
token before it goes.
"""

import argparse
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from scalellm._core import EngineListener
from scalellm.cli.progress import Progress
from scalellm.config import EngineConfig
from scalellm.controller.cores import usable_cores
from scalellm.engine.loop import Command, EngineLoop
from scalellm.engine.worker import Executor
from scalellm.executor.batch import Batch
from scalellm.executor.single import SingleExecutor

_TOKEN = 300
_WORDS = ("the", "rabbit", "and", "garden", "friend", "river", "said", "little")


class TimedExecutor:
    """Each step takes `step_ms`, whatever it holds; every token is the same."""

    max_model_len = 8192
    device = torch.device("cpu")
    block_size = 16
    num_blocks = 65_536
    last_forward_ms: Mapping[str, float] = {}
    torch_threads = None

    def __init__(self, vocab_size: int, step_ms: float) -> None:
        self.vocab_size = vocab_size
        self.model_config = SimpleNamespace(eos_token_ids=(0,))
        self._step_s = step_ms / 1e3

    def check(self) -> None:
        """Nothing can end it."""

    def expert_use(self) -> None:
        """It has no experts."""

    def forward(self, batch: Batch) -> torch.Tensor:
        time.sleep(self._step_s)
        logits = torch.zeros((batch.num_logits, self.vocab_size))
        logits[:, _TOKEN] = 1.0
        return logits

    def greedy(self, batch: Batch) -> list[int | None]:
        time.sleep(self._step_s)
        return [_TOKEN] * batch.num_logits

    def draw(self, batch: Batch, _draws: object) -> list[int | None]:
        return self.greedy(batch)


class TextListener:
    """What comes and goes passes through the tokenizer, on the loop's thread."""

    def __init__(self, listener: EngineListener, tokenizer: Tokenizer) -> None:
        self._listener = listener
        self._tokenizer = tokenizer
        self._decoders: dict[int, DecodeStream] = {}
        self.emit_kv = listener.emit_kv
        self.note_step = listener.note_step
        self.answer_calibrate = listener.answer_calibrate
        self.drain = listener.drain

    def poll(self, timeout_s: float) -> list[Command]:
        commands = self._listener.poll(timeout_s)
        for name, value in commands:
            if name == "submit":
                self._encode(len(value.prompt_ids))
                self._decoders[value.key] = DecodeStream(skip_special_tokens=True)
        return commands

    def emit(self, outputs: Sequence[tuple[Any, ...]], load: tuple[Any, ...]) -> None:
        for key, token_ids, finish_reason, *_ in outputs:
            for token_id in token_ids:
                self._decoders[key].step(self._tokenizer, token_id)
            if finish_reason is not None:
                self._decoders.pop(key, None)
        self._listener.emit(outputs, load)

    def _encode(self, tokens: int) -> None:
        """A text of about as many tokens that the tokenizer has not seen."""
        self._tokenizer.encode(" ".join(random.choices(_WORDS, k=tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description="The real engine loop, with or without text.")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--step-ms", type=float)
    parser.add_argument("--text", action="store_true")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    config = EngineConfig(model_path=options.model, cpu_threads=usable_cores())
    executor: Executor
    if options.step_ms is None:
        executor = SingleExecutor.load(config, Progress(None).phase)
    else:
        config = replace(config, max_num_batched_tokens=8192, cpu_threads=1)
        executor = TimedExecutor(tokenizer.get_vocab_size(), options.step_ms)
    listener = EngineListener(
        options.listen,
        {
            "model": "demo",
            "epoch": time.time_ns(),
            "vocab_size": executor.vocab_size,
            "max_model_len": executor.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "block_size": executor.block_size,
            "num_blocks": executor.num_blocks,
        },
    )
    served = TextListener(listener, tokenizer) if options.text else listener
    loop = EngineLoop(executor, served, config)
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    try:
        loop.run()
    finally:
        listener.close()


if __name__ == "__main__":
    main()
