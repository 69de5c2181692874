"""Times what works row by row: norms, rotary angles, and drawing tokens."""

from collections.abc import Iterator
from functools import partial

import torch

from scalellm.bench.floor import Cost
from scalellm.bench.model_shape import ModelShape
from scalellm.bench.timing import Timed, median_s
from scalellm.engine.request import Request, Sampling
from scalellm.engine.sampler import Sampler
from scalellm.kernels.rms_norm import rms_norm
from scalellm.kernels.rotary import rotary_angles

_EPS = 1e-6
_ROWS = (1, 64, 512)
_DRAWN_ROWS = (1, 64)
_DRAWS = {
    "greedy": Sampling(temperature=0.0),
    "temperature": Sampling(temperature=0.8),
    "top_k top_p": Sampling(temperature=0.8, top_k=50, top_p=0.95),
}


def time_rows(shape: ModelShape, seconds: float) -> Iterator[Timed]:
    for rows in _ROWS:
        x, weight = torch.rand(rows, shape.hidden).bfloat16(), torch.ones(shape.hidden).bfloat16()
        time_s = median_s(partial(rms_norm, x, weight, _EPS), seconds)
        yield Timed("rms_norm", f"{rows} x {shape.hidden}", time_s, None)
    frequencies = torch.rand(shape.head_dim // 2)
    for rows in _ROWS:
        positions = torch.arange(rows)
        time_s = median_s(partial(rotary_angles, positions, frequencies, 1.0), seconds)
        yield Timed("rotary angles", f"{rows} x {shape.head_dim}", time_s, None)
    for rows in _DRAWN_ROWS:
        logits = torch.randn(rows, shape.vocab, generator=torch.Generator().manual_seed(rows))
        for name, sampling in _DRAWS.items():
            yield _time_draw(name, logits, sampling, seconds)


def _time_draw(name: str, logits: torch.Tensor, sampling: Sampling, seconds: float) -> Timed:
    """By the engine's own sampler, which must read every score at least once."""
    rows, vocab = logits.shape
    sampler = Sampler(vocab)
    requests = [
        Request(key, prompt_ids=[0], max_tokens=8, sampling=sampling) for key in range(rows)
    ]
    time_s = median_s(partial(sampler.sample, logits, requests), seconds)
    # One row stays in a cache from call to call.
    read_bytes = float(logits.numel() * logits.itemsize) if rows > 1 else 0.0
    cost = Cost(read_bytes, 0.0, "bf16") if read_bytes else None
    return Timed(f"sample {name}", f"{rows} x {vocab}", time_s, cost)
