"""The next token of every row of a batch, by the CPU's kernels or by a GPU's.

crates/cpu-kernels/src/sampling says how, triton.py draws the same; `scalellm.engine.draw` and
`scalellm.engine.logprobs` do it in torch, on any device.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm import _core
from scalellm.kernels import device

# How a row's token is chosen, as _core.cpu_draw takes it. Below a temperature of 1e-5 the largest
# score is; a top_k of 0 is off; `index` is how many tokens came before.
DRAW = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.uint64),
        ("seed", np.uint64),
        ("choice", np.uint64),
        ("index", np.uint64),
    ]
)


def draw(scores: Tensor, draws: npt.NDArray[np.void]) -> list[int | None]:
    """An id for each row of `scores` [rows, vocab] float32, as `draws` [rows] of DRAW say.

    None for a row whose scores hold NaN or infinity, or nothing but minus infinity.
    """
    if draws.dtype != DRAW or draws.shape != scores.shape[:1] or not draws.flags.c_contiguous:
        raise ValueError(f"{draws.dtype} {draws.shape} for scores {list(scores.shape)}")
    if device.on_gpu(scores):
        from scalellm.kernels.sampling import triton

        return ids_of(triton.draw(scores, draws))
    scores = _rows(scores)
    return _core.cpu_draw(_at(scores), scores.shape[1], draws.ctypes.data)


def ids_of(drawn: Tensor) -> list[int | None]:
    """What a GPU has drawn, -1 for none, as `draw` gives it; waits for it."""
    ids: list[int] = drawn.tolist()
    return [None if token_id < 0 else token_id for token_id in ids]


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], alternatives: Sequence[int]
) -> list[tuple[int, float, int, list[int], list[float]]]:
    """Of `token_ids` under log-softmax of `logits` [rows, vocab] float32, with the most likely
    `alternatives[row]`: token id, logprob, rank, ids and logprobs of these."""
    logits = _rows(logits)
    return _core.cpu_logprobs(_at(logits), logits.shape[1], list(token_ids), list(alternatives))


def _rows(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.dim() != 2 or x.device.type != "cpu":
        raise ValueError(f"{x.dtype} {list(x.shape)} on {x.device}: not float32 rows on a CPU")
    return x if x.stride(1) == 1 else x.contiguous()


def _at(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.shape[0], x.stride(0)
