"""ScaleLLM: an end-to-end serving system for large language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalellm.llm import LLM
    from scalellm.outputs import CompletionOutput, Logprob, RequestOutput
    from scalellm.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "scalellm.llm",
    "CompletionOutput": "scalellm.outputs",
    "Logprob": "scalellm.outputs",
    "RequestOutput": "scalellm.outputs",
    "SamplingParams": "scalellm.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line imports this package and must start at once."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
