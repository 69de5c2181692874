"""Mistral (Jiang et al., 2023): a Llama whose layers may look back over a sliding window only."""

from scalellm.models.llama import LlamaBlock


class MistralBlock(LlamaBlock):
    """ModelConfig.windows carries the sliding window of every layer."""
