"""Steps of one model on a GPU: prompts as they come, decodes recorded, the next one ahead.

    host     launch N+1 | wait for N's ids | update, schedule | launch N+2 | wait for N+1's ids ...
    device   [---- N ----][--------- N+1 ---------][--------- N+2 ---------]

A greedy decode step of few sequences is followed at once by the step that most likely comes next:
the same sequences with the ids just drawn, which never leave the device. If the scheduler then asks
for anything else, that step was for nothing; what it stored lies behind the end of its sequences,
and whoever computes these positions later stores over it. With more sequences one of them ends, or
another begins, too often for that to pay.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.config import EngineConfig
from scalellm.executor.graphs import Copied, CudaGraphs, DecodeGraphs, Draw, Launched
from scalellm.executor.inputs import StepArrays
from scalellm.executor.paged_inputs import build_paged_step, prompt_kernel
from scalellm.kernels.attention import KVCache
from scalellm.kernels.attention.flashinfer import FlashInferPrefill
from scalellm.kernels.sampling import DRAW, ids_of
from scalellm.loader.load import LoadedModel
from scalellm.models.decoder import CausalLM

MOST_AHEAD = 8  # sequences of a step that is followed by the next one unasked


@dataclass(frozen=True, slots=True)
class Ahead:
    """A step that was started before it was asked for."""

    arrays: StepArrays  # but for the token ids
    token_ids: list[int]
    launched: Launched
    copied: Copied


class GpuSteps:
    """Computes batches given as arrays. Not thread-safe."""

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        device: torch.device,
        draw: Draw,
        graphs: DecodeGraphs | None,
        tally: Tensor | None = None,
        prompts: FlashInferPrefill | None = None,
    ) -> None:
        """`draw`: greedy; `graphs`: None to run every step from Python; `tally`: as of Step;
        `prompts`: as of `build_paged_step`."""
        self._model, self._cache, self._device = model, cache, device
        self._draw, self._graphs, self._tally = draw, graphs, tally
        self._prompts = prompts
        self._ahead: Ahead | None = None
        self.steps_ahead = 0  # that were asked for

    def forward(self, arrays: StepArrays) -> Tensor:
        """Logits float32 [logit rows, vocab_size]; the next step may write over them."""
        self._ahead = None
        if self._graphs is not None and self._graphs.fits(arrays):
            return self._graphs.launch(arrays).logits
        token_ids, step = build_paged_step(arrays, self._cache, self._device, self._prompts)
        return self._model.forward(token_ids, replace(step, tally=self._tally))

    def greedy(self, arrays: StepArrays, followed: bool) -> list[int | None]:
        """The id of each logit row's largest logit, None where that is not finite.

        `followed`: no sequence ends with these ids, so the same ones will most likely go on."""
        if self._graphs is None or not self._graphs.fits(arrays):
            return ids_of(self._draw(self.forward(arrays)))
        ahead, self._ahead = self._ahead, None
        if ahead is not None and is_next(ahead, arrays):
            self.steps_ahead += 1
            launched, copied = ahead.launched, ahead.copied
        else:
            launched = self._graphs.launch(arrays)
            copied = launched.start_copy()
        following = next_step(arrays, self._cache.block_size) if followed else None
        if following is None:
            return copied.wait()
        launched = self._graphs.launch(following, launched.ids)
        copied_next = launched.start_copy()
        ids = copied.wait()
        known = [token_id for token_id in ids if token_id is not None]
        if len(known) == len(ids):
            self._ahead = Ahead(following, known, launched, copied_next)
        return ids


def next_step(arrays: StepArrays, block_size: int) -> StepArrays | None:
    """The decode step after `arrays`, without its token ids; None where a table has no place for
    it, or there are too many."""
    if len(arrays.spans) > MOST_AHEAD:
        return None
    spans = arrays.spans.copy()
    spans[:, 1] += 1
    if (_lengths(arrays) * block_size <= spans[:, 1]).any():
        return None
    return replace(arrays, spans=spans, positions=arrays.positions + 1)


def is_next(ahead: Ahead, arrays: StepArrays) -> bool:
    """Whether `arrays` ask for the step that `ahead` has started. Tables may have grown."""
    started = ahead.arrays
    if (
        len(arrays.spans) != len(started.spans)
        or not np.array_equal(arrays.spans[:, :3], started.spans[:, :3])
        or arrays.token_ids.tolist() != ahead.token_ids
    ):
        return False
    lengths = _lengths(started)
    if (_lengths(arrays) < lengths).any():
        return False
    return all(
        np.array_equal(arrays.tables[now : now + length], started.tables[then : then + length])
        for now, then, length in zip(
            arrays.spans[:, 3].tolist(), started.spans[:, 3].tolist(), lengths.tolist(), strict=True
        )
    )


def _lengths(arrays: StepArrays) -> npt.NDArray[np.int64]:
    """Blocks of each span's table."""
    begins = arrays.spans[:, 3]
    return np.append(begins[1:], len(arrays.tables)) - begins


def gpu_steps(
    config: EngineConfig, loaded: LoadedModel, cache: KVCache, tally: Tensor | None
) -> GpuSteps | None:
    """How a model's steps are run on a GPU; None where torch runs them: on a CPU, and for models
    that transformers' code computes. `tally`: as of Step."""
    if loaded.device.type != "cuda" or loaded.config.family == "transformers":
        return None
    from scalellm.kernels.sampling.triton import draw, greedy

    # Compiled now, not before the first request that draws with noise.
    row = np.array([(1.0, 0.5, 0.0, 1, 0, 0, 0)], dtype=DRAW)
    draw(torch.zeros(1, loaded.config.vocab_size, device=loaded.device), row)
    graphs: DecodeGraphs | None = None
    if not config.enforce_eager:
        most = min(config.max_num_seqs, config.max_num_batched_tokens)
        graphs = DecodeGraphs(loaded.model, cache, most, greedy, CudaGraphs(), tally)
    prompts = prompt_kernel(config, loaded)
    return GpuSteps(loaded.model, cache, loaded.device, greedy, graphs, tally, prompts)
