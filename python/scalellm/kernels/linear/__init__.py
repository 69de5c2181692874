"""Matrix product with a weight, the work that fills most of a step."""

from scalellm.kernels.linear.reference import linear

__all__ = ["linear"]
