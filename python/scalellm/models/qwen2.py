"""Qwen2 and 2.5 (Yang et al., 2024): a Llama with biases on queries, keys and values."""

from scalellm.models.llama import LlamaBlock


class Qwen2Block(LlamaBlock):
    """ModelConfig.qkv_bias is true; layers from max_window_layers on may have a sliding window."""
