"""Any other causal language model: transformers' own code, with our attention plugged in.

transformers lets an attention function be registered by name and passes it the keyword arguments of
the model's forward. So the whole batch goes through as one row of T tokens with their positions,
and each layer's attention, instead of looking at its neighbours in the row, stores its keys and
values in the paged cache and attends to its own sequence there.

What only works with other state between steps than keys and values is refused, by its class where
it says so, and by `verify` where it does not.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.errors import UnsupportedModelError
from scalellm.kernels.attention import (
    AttentionStep,
    KVCache,
    KVGeometry,
    LayerCache,
    paged_attention,
    plan_attention,
    write_kv,
)
from scalellm.kernels.attention.step import SpanLayout
from scalellm.layers.step import Step

ATTENTION = "scalellm_paged"
_VERIFY_IDS = 12
# Relative to the logits' own deviation: far above rounding, far below what a wrong mask does.
_VERIFY_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.25}


@dataclass(slots=True)
class Probe:
    """Takes the place of a Step to learn each layer's shapes, on one sequence without a cache."""

    layers: dict[int, tuple[int, int, int, int | None]] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: "_Options"
    ) -> Tensor:
        if layer in self.layers:
            raise UnsupportedModelError(f"layer {layer} attends twice in one forward pass")
        self.layers[layer] = (key.shape[1], key.shape[-1], value.shape[-1], options.window)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.scale
        ).transpose(1, 2)

    def geometry(self) -> KVGeometry:
        """Raises UnsupportedModelError where the layers are not alike."""
        shapes = {shape[:3] for shape in self.layers.values()}
        if len(shapes) != 1 or sorted(self.layers) != list(range(len(self.layers))):
            raise UnsupportedModelError(
                "its layers' keys and values have different shapes, or some layers do not attend: "
                f"(kv heads, key width, value width) {sorted(shapes)} in {len(self.layers)} layers"
            )
        kv_heads, key_dim, value_dim = shapes.pop()
        windows = tuple(self.layers[layer][3] for layer in range(len(self.layers)))
        return KVGeometry(len(self.layers), kv_heads, key_dim, value_dim, windows)


@dataclass(frozen=True, slots=True)
class _Options:
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def register_attention() -> None:
    """Make ATTENTION known to transformers; harmless to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    scalellm_step: "Step | Probe | None" = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, T, d] to ([1, T, heads, d], no weights)."""
    if scalellm_step is None:
        raise UnsupportedModelError("its layers do not pass forward's arguments to attention")
    if position_bias is not None or attention_mask is not None:
        raise UnsupportedModelError("its attention adds a bias or mask of its own")
    options = _Options(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or _window_of(module),
        softcap=softcap,
        sinks=s_aux,
    )
    if isinstance(scalellm_step, Probe):
        return scalellm_step.attend(module.layer_idx, query, key, value, options), None
    cache, plan = scalellm_step.cache.layers[module.layer_idx], scalellm_step.attention
    if not isinstance(cache, LayerCache) or not isinstance(plan, AttentionStep):
        raise TypeError("transformers' models are run on torch's KV cache")
    write_kv(cache, key[0].transpose(0, 1), value[0].transpose(0, 1), plan)
    attended = paged_attention(
        query[0].transpose(0, 1),
        cache,
        plan,
        scale=options.scale,
        window=options.window,
        softcap=options.softcap,
        sinks=options.sinks,
    )
    return attended.unsqueeze(0), None


def _window_of(module: Any) -> int | None:
    """The window of a layer whose model leaves it to the mask."""
    types_of_layers = getattr(module.config, "layer_types", None)
    if types_of_layers and types_of_layers[module.layer_idx] == "sliding_attention":
        window: int | None = getattr(module.config, "sliding_window", None)
        return window
    return None


class TransformersModel:
    """A CausalLM around a transformers model whose attention implementation is ATTENTION."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self.geometry = self._probe()

    def forward(self, token_ids: Tensor, step: Step) -> Tensor:
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=step.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=step.logit_rows,
            scalellm_step=step,
        )
        return self._logits(output)[0].float()

    def verify(self) -> None:
        """Compare a prompt in two chunks with the model's own attention over the whole of it.

        Raises UnsupportedModelError when they differ: the model then keeps state that is not in
        the KV cache, or masks attention in a way its calls do not tell.
        """
        device, dtype = self._model.device, self._model.dtype
        ids = torch.arange(_VERIFY_IDS, device=device) * 7 % self._model.config.vocab_size
        with torch.inference_mode():
            self._model.set_attn_implementation("eager")
            try:
                expected = self._logits(self._model(input_ids=ids[None], use_cache=False))[
                    0
                ].float()
            finally:
                self._model.set_attn_implementation(ATTENTION)
            found = self._in_chunks(ids)
        error = (found - expected).norm() / (expected - expected.mean()).norm()
        if not error < _VERIFY_TOLERANCE.get(dtype, 0.25):
            raise UnsupportedModelError(
                f"computed in chunks, {type(self._model).__name__} differs from transformers by "
                f"{error:.2g} of the logits' deviation: it keeps state outside the KV cache, or "
                "masks attention in a way that the paged cache does not know"
            )

    def _in_chunks(self, ids: Tensor) -> Tensor:
        size, cut = 4, _VERIFY_IDS // 2 + 1
        blocks = -(-_VERIFY_IDS // size)
        kind = (self._model.dtype, self._model.device)
        cache = KVCache.allocate(self.geometry, blocks, size, *kind)
        table = torch.arange(blocks).flip(0).numpy()
        logits = []
        for start, end in ((0, cut), (cut, len(ids))):
            span = SpanLayout(0, start, end - start, table)
            step = Step(
                positions=torch.arange(start, end, device=ids.device),
                cache=cache,
                attention=plan_attention([span], self.geometry, size, *kind),
                logit_rows=torch.arange(end - start, device=ids.device),
            )
            logits.append(self.forward(ids[start:end], step))
        return torch.cat(logits)

    def _probe(self) -> KVGeometry:
        probe = Probe()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self._model.device)
        positions = torch.arange(2, device=self._model.device)[None]
        with torch.inference_mode():
            self._model(input_ids=ids, position_ids=positions, use_cache=False, scalellm_step=probe)
        return probe.geometry()

    @staticmethod
    def _logits(output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits
