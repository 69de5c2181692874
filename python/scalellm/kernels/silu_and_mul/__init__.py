"""The gate of a gated MLP: silu(gate) * up."""

from scalellm.kernels.silu_and_mul.reference import silu_and_mul

__all__ = ["silu_and_mul"]
