"""transformers' continuous batching on the same shape, in this process: no HTTP, no tokenizer."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig


def measure(
    folder: Path, input_tokens: int, output_tokens: int, levels: tuple[int, ...]
) -> dict[str, Any]:
    """All requests of a level at once, bf16 weights; the second of two runs counts."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    rows = []
    for count in levels:
        generator = torch.Generator().manual_seed(count)
        shape = (count, input_tokens)
        prompts = torch.randint(300, 30000, shape, generator=generator).tolist()
        wanted = GenerationConfig(
            max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        for _ in range(2):
            began = time.perf_counter()
            found = model.generate_batch(
                inputs=prompts, generation_config=wanted, record_timestamps=True
            )
            ended = time.perf_counter()
        rows.append(_row(count, list(found.values()), ended - began))
    return {"transformers": transformers.__version__, "rows": rows}


def _row(count: int, found: list[Any], spent_s: float) -> dict[str, Any]:
    tokens = sum(len(output.generated_tokens) for output in found)
    row: dict[str, Any] = {"concurrency": count, "output_tok_s": tokens / spent_s}
    stamped = [output for output in found if output.timestamps and len(output.timestamps) > 1]
    if stamped:
        first = [output.timestamps[0] - output.created_time for output in stamped]
        between = [
            (output.timestamps[-1] - output.timestamps[0]) / (len(output.timestamps) - 1)
            for output in stamped
        ]
        row["ttft_ms"] = statistics.median(first) * 1e3
        row["tbt_ms"] = statistics.median(between) * 1e3
    return row
