"""Qwen3 (Yang et al., 2025): each head's query and key is normalised before turning."""

from scalellm.models.llama import LlamaBlock


class Qwen3Block(LlamaBlock):
    """ModelConfig.qk_norm is true."""
