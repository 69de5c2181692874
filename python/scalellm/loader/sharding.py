"""One rank's part of a model's weights, and which numbers of ranks can have parts at all."""

import torch
from torch import Tensor

from scalellm import _core
from scalellm.errors import ConfigError
from scalellm.kernels.linear import Matrix, PackedMatrix
from scalellm.layers.shard import GROUPS, Shard
from scalellm.layers.weights import MatrixSpec, Use, WeightSource
from scalellm.loader.packing import Packing
from scalellm.models.config import ModelConfig

SIZES = tuple(n for n in (1, 2, 4, 8) if n <= _core.MOST_RANKS)


class ShardSource:
    """A WeightSource that gives a shard's parts of the packed matrices which another one gives."""

    def __init__(self, source: WeightSource, shard: Shard, keep_views: bool) -> None:
        """`keep_views`: of matrices that stay in memory anyway, as those of a mapped file do."""
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self.shard = shard
        self._source = source
        self._keep_views = keep_views

    def fill(self, out: Tensor, name: str) -> None:
        self._source.fill(out, name)

    def table(self, name: str, n: int, d: int) -> Tensor:
        return self._source.table(name, n, d)

    def matrix(self, spec: MatrixSpec, tied: Tensor | None = None) -> Matrix:
        whole = self._source.matrix(spec, tied)
        if not isinstance(whole, PackedMatrix):
            raise TypeError("several ranks divide packed weights alone")
        if not spec.divided or spec.use is Use.ROUTER:
            return whole
        if spec.use is Use.ROW:
            part = whole.of_groups(self.shard.groups())
        else:
            part = whole.of_rows(spec.rows_of(self.shard))
        is_view = part.data.untyped_storage().data_ptr() == whole.data.untyped_storage().data_ptr()
        return part.copy() if is_view and not self._keep_views else part


def check_division(
    model: ModelConfig, packing: Packing | None, ranks: int, expert_parallel: bool
) -> None:
    """Raises ConfigError, which says what would fit, where so many ranks cannot share the model."""
    if expert_parallel and model.moe is None:
        raise ConfigError(f"--enable-expert-parallel: {model.architecture} has no experts")
    if ranks == 1:
        return
    flag = f"--tensor-parallel-size {ranks}"
    if model.family == "transformers":
        raise ConfigError(
            f"{flag} needs a model with code of its own here; transformers' code runs "
            f"{model.architecture}"
        )
    if reasons := obstacles(model, packing, ranks, expert_parallel):
        fitting = [
            str(size) for size in SIZES if not obstacles(model, packing, size, expert_parallel)
        ]
        raise ConfigError(f"{flag}: {'; '.join(reasons)}; what fits: {', '.join(fitting)}")


def obstacles(
    model: ModelConfig, packing: Packing | None, ranks: int, expert_parallel: bool = False
) -> list[str]:
    """Why so many ranks cannot share the model; nothing if they can. `packing`: None for torch's
    and a GPU's kernels, which divide inputs evenly; the CPU's hand out whole groups."""
    if ranks == 1:
        return []
    if ranks not in SIZES:
        return ["it can be " + ", ".join(map(str, SIZES))]
    found = []
    if model.num_heads % ranks:
        found.append(f"{model.num_heads} attention heads are not divisible by it")
    if model.num_kv_heads % ranks and ranks % model.num_kv_heads:
        found.append(f"{model.num_kv_heads} key-value heads neither divide it nor are divisible")
    inputs = {"the attention's output": model.num_heads * model.head_dim}
    if model.moe is None or not all(model.moe.sparse_layers):
        inputs["the MLP's output"] = model.intermediate_size
    if model.moe is not None and expert_parallel:
        if model.moe.num_experts % ranks:
            found.append(f"{model.moe.num_experts} experts are not divisible by it")
    elif model.moe is not None:
        inputs["an expert's output"] = model.moe.intermediate_size
    for name, k in inputs.items():
        if packing is None:
            if k % ranks:
                found.append(f"the {k} inputs of {name} are not divisible by it")
        elif packing.layout(MatrixSpec(((name, model.hidden_size),), k, Use.ROW)).groups != GROUPS:
            found.append(
                f"the {k} inputs of {name} are not {GROUPS} groups of whole {packing.group_unit}s"
            )
    if len(set(Shard(ranks=ranks).id_bounds(model.vocab_size))) <= ranks:
        found.append(f"a vocabulary of {model.vocab_size} is too small")
    return found
