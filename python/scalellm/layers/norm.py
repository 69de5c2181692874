"""Normalisation."""

from torch import Tensor

from scalellm.kernels.linear import Fp8Matrix, Matrix
from scalellm.kernels.quantise import Activations
from scalellm.kernels.rms_norm import add_rms_norm
from scalellm.layers.weights import WeightSource, take


class RMSNorm:
    """[T, d] -> [T, d], each row scaled to unit root mean square times a learned weight."""

    def __init__(self, source: WeightSource, name: str, d: int, eps: float) -> None:
        self.weight = take(source, f"{name}.weight", d)
        self.eps = eps

    def __call__(
        self, x: Tensor, delta: Tensor | None, feeds: Matrix
    ) -> tuple[Tensor, Activations]:
        """x + delta, and its norm in the form that `feeds`, which multiplies it next, wants."""
        return add_rms_norm(x, delta, self.weight, self.eps, isinstance(feeds, Fp8Matrix))
