"""The frame that all decoder-only families share: embed, a stack of blocks, norm, project."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from scalellm.kernels.attention import KVGeometry
from scalellm.layers.linear import Embedding, OutputLayer
from scalellm.layers.norm import RMSNorm
from scalellm.layers.rotary import Rotary
from scalellm.layers.step import Step
from scalellm.layers.weights import WeightSource
from scalellm.models.config import ModelConfig


class CausalLM(Protocol):
    """What an executor runs."""

    @property
    def geometry(self) -> KVGeometry:
        """What a token needs in the KV cache."""

    def forward(self, token_ids: Tensor, step: Step) -> Tensor:
        """Ids [T] int64 to logits fp32 [n, vocab_size] of step.logit_rows; stores keys, values."""


class Block(Protocol):
    """One layer of a family: residual stream [T, hidden] -> [T, hidden], or of `rows` alone.

    What is still to be added to the stream goes beside it, to be added where it is normalised."""

    def __call__(
        self, x: Tensor, delta: Tensor | None, step: Step, angles: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class BlockFactory(Protocol):
    def __call__(self, config: ModelConfig, source: WeightSource, layer: int) -> Block: ...


class Decoder:
    """A CausalLM made of one family's blocks."""

    def __init__(self, config: ModelConfig, source: WeightSource, block: BlockFactory) -> None:
        kv_heads = len(source.shard.heads(config.num_kv_heads))
        self.geometry = replace(config.kv_geometry, num_kv_heads=kv_heads)
        self.embedding = Embedding(
            source, "model.embed_tokens", config.vocab_size, config.hidden_size
        )
        self.rotary = Rotary(config.rope, source.device)
        self.blocks = [block(config, source, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(source, "model.norm", config.hidden_size, config.norm_eps)
        tied = self.embedding.weight if config.tie_word_embeddings else None
        self.output = OutputLayer(source, "lm_head", config.vocab_size, config.hidden_size, tied)

    def forward(self, token_ids: Tensor, step: Step) -> Tensor:
        x = self.embedding(token_ids)
        angles = self.rotary(step.positions)
        delta: Tensor | None = None
        *others, last = self.blocks
        for block in others:
            x, delta = block(x, delta, step, angles, None)
        # Behind the last layer's keys and values nobody reads the other rows.
        x, delta = last(x, delta, step, angles, step.logit_rows)
        _, normal = self.norm(x, delta, self.output.weight)
        return self.output(normal)
