"""The experts of a sparse layer, each computing the tokens that were routed to it."""

from scalellm.kernels.moe.cpu import experts

__all__ = ["experts"]
