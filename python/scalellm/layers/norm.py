"""Normalisation."""

from torch import Tensor

from scalellm.kernels.rms_norm import rms_norm
from scalellm.layers.weights import WeightSource, take


class RMSNorm:
    """[..., d] -> [..., d], each row scaled to unit root mean square times a learned weight."""

    def __init__(self, source: WeightSource, name: str, d: int, eps: float) -> None:
        self.weight = take(source, f"{name}.weight", d)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
