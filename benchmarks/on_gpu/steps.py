"""Whole decode steps of the engine in this process: time, and the experts that they read."""

import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from scalellm.config import EngineConfig
from scalellm.engine.calibration import Shape, build_batch
from scalellm.engine.kv_cache import KVCache
from scalellm.executor.batch import Batch
from scalellm.executor.single import SingleExecutor
from scalellm.kernels.moe import triton as moe

_STEPS = 30


def measure(
    folder: Path, quantization: str, context: int, levels: tuple[int, ...]
) -> dict[str, Any]:
    config = EngineConfig(
        model=str(folder), model_path=folder, load_format="dummy", device="cuda", dtype="bfloat16",
        quantization=quantization, max_model_len=4096,
    )  # fmt: skip
    loading: list[list[object]] = []
    began = time.perf_counter()
    executor = SingleExecutor.load(
        config, lambda phase, spent_s: loading.append([phase, round(spent_s, 2)])
    )
    loaded_s = time.perf_counter() - began
    rows = [_decode(executor, count, context) for count in levels]
    executor.close()
    return {"loaded_s": loaded_s, "loading": loading, "rows": rows}


def _decode(executor: SingleExecutor, sequences: int, context: int) -> dict[str, Any]:
    kv = KVCache(executor.num_blocks, executor.block_size, False)
    built = build_batch(Shape(sequences, context, 0), kv)
    if built is None:
        return {"sequences": sequences, "error": "the KV cache is too small"}
    # The same step again and again: none is to be started ahead.
    batch = Batch(tuple(span._replace(last=True) for span in built[0].spans))
    began = time.perf_counter()
    executor.greedy(batch)
    first_s = time.perf_counter() - began
    alone, queued = [], []
    for _ in range(_STEPS):
        began = time.perf_counter()
        executor.greedy(batch)
        alone.append(time.perf_counter() - began)
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(_STEPS):
            executor.forward(batch)
        torch.cuda.synchronize()
        queued.append((time.perf_counter() - began) / _STEPS)
    return {
        "sequences": sequences,
        "context": context,
        "first_step_s": first_s,  # recorded, and kernels compiled
        "step_and_ids_ms": statistics.median(alone) * 1e3,
        "step_back_to_back_ms": statistics.median(queued) * 1e3,
    }


class CountedExperts:
    """While active, keeps how many experts each layer of each step has read."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __enter__(self) -> "CountedExperts":
        plain, found = moe.Routed.__init__, self.found

        def counted(routed: moe.Routed, *args: Any, **more: Any) -> None:
            plain(routed, *args, **more)
            found.append(int(routed.counts.count_nonzero().item()))

        self._patch = patch.object(moe.Routed, "__init__", counted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def experts_read(folder: Path, levels: tuple[int, ...]) -> list[dict[str, Any]]:
    """Distinct experts a layer and step, over the second half of 32 greedy tokens of random
    prompts; below 7.5 of 8 at 64, random weights have collapsed the routing."""
    from scalellm import LLM, SamplingParams

    rows = []
    settings = {"load_format": "dummy", "device": "cuda", "dtype": "bfloat16"}
    with LLM(
        str(folder), quantization="fp8", enforce_eager=True, max_model_len=4096, **settings
    ) as llm:
        for count in levels:
            generator = torch.Generator().manual_seed(count)
            prompts = torch.randint(300, 30000, (count, 64), generator=generator).tolist()
            params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
            with CountedExperts() as counted:
                llm.generate(prompts, params, use_tqdm=False)
            late = counted.found[len(counted.found) // 2 :]
            rows.append({"sequences": count, "experts": statistics.mean(late)})
    return rows
