"""Records a model's step once, as a plan that the CPU's kernels run without Python.

    model.forward  --torch operators-->  Recording  --ops, buffers-->  _core.CpuPlan

The model runs on tensors of a few rows, in which nothing is computed: each operator that comes by
is written down with the buffers it reads and writes, and views keep pointing into them. Rows stand
for the step's tokens, or for those whose logits are asked for; a plan serves any number of both.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scalellm import _core
from scalellm.executor.inputs import StepArrays
from scalellm.kernels.attention import PackedKVCache, PackedStep
from scalellm.kernels.sampling import DRAW
from scalellm.layers.step import Step
from scalellm.models.decoder import CausalLM

_TOKENS, _OUTPUTS = 5, 3  # rows while recording; different, so that they tell what they stand for
_VIEWS = ("view", "split", "slice", "select", "unsqueeze", "squeeze", "alias", "detach", "t")

# A view of rows as _core.CpuPlan takes it: buffer, first column, columns.
View = tuple[int, int, int]


class NotRecordableError(Exception):
    """The model does something that no op of a plan does."""


def record(
    model: CausalLM, cache: PackedKVCache, ranks: _core.Ranks | None = None
) -> _core.CpuPlan:
    """The plan of `model`'s step over `cache`, by `ranks` together. Raises NotRecordableError.

    The plan points into the model's weights and into the cache: it lives no longer than they.
    """
    ids = torch.zeros(_TOKENS, dtype=torch.int64)
    positions = torch.zeros(_TOKENS, dtype=torch.int64)
    rows = torch.zeros(_OUTPUTS, dtype=torch.int64)
    nothing = PackedStep(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    step = Step(positions=positions, cache=cache, attention=nothing, logit_rows=rows)
    recording = Recording(ids, positions, rows, ranks)
    listening = _Listening()
    listening.recording = recording
    with torch.no_grad(), listening:
        model.forward(ids, step)
    recording.plan.finish()
    return recording.plan


def logits_of(plan: _core.CpuPlan, arrays: StepArrays, logits: Tensor) -> None:
    """Run a step and write its `logits` [logit rows, vocab_size] fp32.

    Raises ValueError for a step that contradicts itself."""
    plan.logits_of(_at(arrays), logits.shape[1], logits.data_ptr())


def greedy_ids(plan: _core.CpuPlan, arrays: StepArrays) -> list[int | None]:
    """Run a step: each logit row's largest id, the lowest on ties; no logits are written.

    None where the largest is not finite. Raises ValueError for a step that contradicts itself."""
    return plan.greedy_ids(_at(arrays))


def draw_ids(
    plan: _core.CpuPlan, arrays: StepArrays, draws: npt.NDArray[np.void]
) -> list[int | None]:
    """Run a step and draw an id for each logit row as `draws` [logit rows] of
    `scalellm.kernels.sampling.DRAW` say; no logits are written.

    None where they are not finite. Raises ValueError for a step that contradicts itself, and for
    draws that need more than the 64 largest logits."""
    whole = draws.dtype == DRAW and draws.flags.c_contiguous
    if not whole or draws.shape != arrays.logit_rows.shape:
        raise ValueError(f"{draws.dtype} {draws.shape} for {len(arrays.logit_rows)} logit rows")
    return plan.draw_ids(_at(arrays), draws.ctypes.data)


def _at(
    arrays: StepArrays,
) -> tuple[tuple[int, int], int, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Where a step's arrays are, as _core.CpuPlan takes them."""
    return (
        (arrays.token_ids.ctypes.data, len(arrays.token_ids)),
        arrays.positions.ctypes.data,
        (arrays.logit_rows.ctypes.data, len(arrays.logit_rows)),
        (arrays.spans.ctypes.data, len(arrays.spans)),
        (arrays.tables.ctypes.data, len(arrays.tables)),
    )


class _Listening(TorchDispatchMode):
    """While active, hands torch operators to `recording` instead of computing them."""

    recording: "Recording"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Recording is never compiled; the wrapper that says so would import torch._dynamo."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recording.take(func, args, kwargs or {})


class Recording:
    """Writes operators into `plan`; what they return has the right shape and no content."""

    def __init__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        ranks: _core.Ranks | None = None,
    ) -> None:
        self.plan = _core.CpuPlan(ranks)
        self._token_ids = token_ids.data_ptr()
        self._positions = positions.data_ptr()
        self._logit_rows = logit_rows.data_ptr()
        self._buffers: dict[int, int] = {}  # where a tensor's memory begins -> buffer
        self._made: list[Tensor] = []  # kept, so that no two buffers begin at one place
        ops = torch.ops
        self._ops: dict[Any, Callable[..., Tensor]] = {
            ops.aten.index_select.default: self._index_select,
            ops.aten.add.Tensor: self._add,
            ops.scalellm.rotary_angles.default: self._rotary_angles,
            ops.scalellm.rms_norm.default: self._rms_norm,
            ops.scalellm.linear.default: self._linear,
            ops.scalellm.linear_silu_and_mul.default: self._linear_silu_and_mul,
            ops.scalellm.linear_reduced.default: self._linear_reduced,
            ops.scalellm.logits.default: self._logits,
            ops.scalellm.logits_among.default: self._logits_among,
            ops.scalellm.attention.default: self._attention,
            ops.scalellm.experts.default: self._experts,
        }

    def take(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write the operator `func` down. Raises NotRecordableError."""
        if (op := self._ops.get(func)) is not None:
            return op(*args, **kwargs)
        if func._schema.name.removeprefix("aten::") in _VIEWS:
            return func(*args, **kwargs)
        raise NotRecordableError(f"a plan has no {func}")

    def _new(self, like: Tensor, cols: int, dtype: torch.dtype) -> tuple[Tensor, View]:
        """A tensor with as many rows as `like`, and the buffer it stands for."""
        made = torch.empty(like.shape[0], cols, dtype=dtype)
        self._made.append(made)
        buffer = self.plan.buffer(cols, dtype == torch.float32, like.shape[0] == _OUTPUTS)
        self._buffers[made.untyped_storage().data_ptr()] = buffer
        return made, (buffer, 0, cols)

    def _view(self, x: Tensor) -> View:
        buffer = self._buffers.get(x.untyped_storage().data_ptr())
        if buffer is None or x.dim() != 2 or x.stride(1) != 1:
            raise NotRecordableError(f"{list(x.shape)} is not rows of a buffer of the plan")
        return buffer, int(x.storage_offset()), x.shape[1]

    def _index_select(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        if dim == 0 and index.data_ptr() == self._token_ids:
            out, view = self._new(index, x.shape[1], x.dtype)
            self.plan.embed((x.data_ptr(), x.shape[0], x.stride(0)), view)
            return out
        if dim == 0 and index.data_ptr() == self._logit_rows:
            out, view = self._new(index, x.shape[1], x.dtype)
            self.plan.pick(self._view(x), view)
            return out
        raise NotRecordableError("rows chosen by something else than token ids or logit rows")

    def _add(self, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
        if alpha != 1 or a.shape != b.shape or a.dtype != b.dtype:
            raise NotRecordableError("a sum of unlike rows")
        out, view = self._new(a, a.shape[1], a.dtype)
        self.plan.add(self._view(a), self._view(b), view)
        return out

    def _rotary_angles(self, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
        if positions.data_ptr() != self._positions:
            raise NotRecordableError("angles of something else than the step's positions")
        out, view = self._new(positions, 2 * len(frequencies), torch.float32)
        self.plan.angles(frequencies.tolist(), factor, view)
        return out

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, view = self._new(x, x.shape[1], x.dtype)
        self.plan.rms_norm(self._view(x), weight.data_ptr(), eps, view)
        return out

    def _product(
        self, x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None, silu: bool
    ) -> Tensor:
        out, view = self._new(x, layout[2] // 2 if silu else layout[2], x.dtype)
        held = (weight.data_ptr(), weight.numel())
        at = 0 if bias is None else bias.data_ptr()
        self.plan.linear(self._view(x), layout, held, at, view)
        return out

    def _linear(self, x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None) -> Tensor:
        return self._product(x, weight, layout, bias, silu=False)

    def _linear_silu_and_mul(
        self, x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None
    ) -> Tensor:
        return self._product(x, weight, layout, bias, silu=True)

    def _logits(self, x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None) -> Tensor:
        if bias is not None:
            raise NotRecordableError("an output layer with a bias")
        self.plan.logits(self._view(x), layout, (weight.data_ptr(), weight.numel()), 0)
        return torch.empty(x.shape[0], layout[2], dtype=torch.float32)

    def _linear_reduced(
        self, x: Tensor, weight: Tensor, layout: list[int], bias: Tensor | None, _ranks: int
    ) -> Tensor:
        out, view = self._new(x, layout[2], x.dtype)
        held = (weight.data_ptr(), weight.numel())
        at = 0 if bias is None else bias.data_ptr()
        self.plan.reduced(self._view(x), layout, held, at, view)
        return out

    def _logits_among(
        self,
        x: Tensor,
        weight: Tensor,
        layout: list[int],
        bounds: list[int],
        rank: int,
        _ranks: int,
    ) -> Tensor:
        held = (weight.data_ptr(), weight.numel())
        self.plan.logits(self._view(x), layout, held, bounds[rank])
        return torch.empty(x.shape[0], bounds[-1], dtype=torch.float32)

    def _attention(
        self,
        qkv: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        eps: float,
        angles: Tensor,
        cache: Tensor,
        kv: list[int],
        _spans: Tensor,
        _tables: Tensor,
        heads: int,
        scale: float,
        window: int,
    ) -> Tensor:
        out, view = self._new(qkv, heads * kv[3], qkv.dtype)
        norms = (0, 0)
        if query_norm is not None and key_norm is not None:
            norms = (query_norm.data_ptr(), key_norm.data_ptr())
        self.plan.attention(
            self._view(qkv),
            heads,
            norms,
            eps,
            self._view(angles),
            (cache.data_ptr(), cache.numel()),
            kv,
            scale,
            window,
            view,
        )
        return out

    def _experts(
        self,
        x: Tensor,
        logits: Tensor,
        gate_ups: list[Tensor],
        downs: list[Tensor],
        gate_up_layout: list[int],
        down_layout: list[int],
        top: int,
        normalise: bool,
        ranks: int,
        divides_experts: bool,
    ) -> Tensor:
        out, view = self._new(x, x.shape[1], x.dtype)
        experts = [
            (
                gate_up_layout,
                (gate_up.data_ptr(), gate_up.numel()),
                down_layout,
                (down.data_ptr(), down.numel()),
            )
            for gate_up, down in zip(gate_ups, downs, strict=True)
        ]
        division = (2 if divides_experts else 1) if ranks else 0
        views = (self._view(x), self._view(logits))
        self.plan.experts(*views, experts, top, normalise, division, view)
        return out
