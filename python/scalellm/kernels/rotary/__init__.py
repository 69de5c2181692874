"""Rotary position embedding of queries and keys."""

from scalellm.kernels.rotary.reference import apply_rotary

__all__ = ["apply_rotary"]
