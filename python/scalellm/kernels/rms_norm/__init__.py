"""RMSNorm: scale each row to unit root mean square, times a learned weight."""

from scalellm.kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
