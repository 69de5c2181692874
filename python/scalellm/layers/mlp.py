"""The gated MLP."""

from torch import Tensor

from scalellm.kernels.linear import Matrix
from scalellm.kernels.quantise import Activations
from scalellm.layers.linear import GatedLinear, Linear
from scalellm.layers.weights import Use, WeightSource


class GatedMLP:
    """down(silu(gate(x)) * up(x)): [T, hidden] -> [T, hidden]."""

    def __init__(
        self,
        source: WeightSource,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
    ) -> None:
        gate_and_up = dict.fromkeys((f"{name}.gate_proj", f"{name}.up_proj"), intermediate_size)
        self.gate_up = GatedLinear.load(source, gate_and_up, hidden_size, Use.GATED, bias)
        self.down = Linear.load(
            source, {f"{name}.down_proj": hidden_size}, intermediate_size, Use.ROW, bias
        )

    @property
    def first(self) -> Matrix:
        """What its input is multiplied by."""
        return self.gate_up.weight

    def __call__(self, x: Activations) -> Tensor:
        return self.down(self.gate_up.gated(x))
