"""The families that have their own code here."""

from collections.abc import Mapping
from types import MappingProxyType

from scalellm.layers.weights import WeightSource
from scalellm.models.config import ModelConfig
from scalellm.models.decoder import BlockFactory, Decoder
from scalellm.models.llama import LlamaBlock
from scalellm.models.mistral import MistralBlock
from scalellm.models.mixtral import MixtralBlock
from scalellm.models.qwen2 import Qwen2Block
from scalellm.models.qwen3 import Qwen3Block
from scalellm.models.qwen3_moe import Qwen3MoeBlock

FAMILIES: Mapping[str, BlockFactory] = MappingProxyType(
    {
        "llama": LlamaBlock,
        "mistral": MistralBlock,
        "mixtral": MixtralBlock,
        "qwen2": Qwen2Block,
        "qwen3": Qwen3Block,
        "qwen3_moe": Qwen3MoeBlock,
    }
)

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "MixtralForCausalLM": "mixtral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "Qwen3MoeForCausalLM": "qwen3_moe",
    }
)


def build(config: ModelConfig, source: WeightSource) -> Decoder:
    """Make the model, its weights taken from `source`. `config.family` is a key of FAMILIES."""
    return Decoder(config, source, FAMILIES[config.family])
