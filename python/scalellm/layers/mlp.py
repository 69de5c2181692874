"""The gated MLP."""

from torch import Tensor

from scalellm.kernels.silu_and_mul import silu_and_mul
from scalellm.layers.linear import Linear
from scalellm.layers.weights import WeightSource


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
        self.gate_up = Linear.load_merged(
            source,
            {f"{name}.gate_proj": intermediate_size, f"{name}.up_proj": intermediate_size},
            hidden_size,
            bias,
        )
        self.down = Linear.load(source, f"{name}.down_proj", intermediate_size, hidden_size, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))
