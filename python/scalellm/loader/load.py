"""From a model folder to a model in memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError
from scalellm.kernels.attention import KVGeometry, PackedKVCache
from scalellm.kernels.linear.packed import INT4_ZEROS
from scalellm.layers.shard import WHOLE, Shard
from scalellm.layers.weights import WeightSource
from scalellm.loader.checkpoint import Checkpoint, CheckpointSource
from scalellm.loader.config import read_model_config, read_quantisation
from scalellm.loader.device import choose_device, choose_dtype
from scalellm.loader.fallback import count_numbers, load_fallback
from scalellm.loader.fp8 import Fp8Source, fp8_obstacle
from scalellm.loader.memory import LEAST_MODEL_LEN, available_cpu_bytes, check_fits, gib
from scalellm.loader.packed_cache import (
    LEAST_BYTES,
    PackedCache,
    UncachedError,
    cache_folder,
    checkpoint_identity,
)
from scalellm.loader.packed_file import MappedWeights, MatrixPart
from scalellm.loader.packing import Packing, PackingSource
from scalellm.loader.quantised import Grouped, ScaledBytes, Scheme
from scalellm.loader.sharding import ShardSource, check_division
from scalellm.loader.sources import DummySource, InventorySource
from scalellm.models.config import ModelConfig
from scalellm.models.decoder import CausalLM
from scalellm.models.registry import build

_KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}

# Called as each phase of loading ends: what was done, and the seconds it took.
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: CausalLM
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    quantization: str  # "none", "int8", "int4", "int4+int8" or "fp8"
    kv_cache_dtype: str  # of keys and values, as --kv-cache-dtype names it, but for `auto`
    packed: bool  # its matrices are laid out for the CPU's kernels
    shard: Shard  # what of it this process has
    mapped_bytes: int  # of them, in files: memory that the kernel could take away, but must not

    @property
    def geometry(self) -> KVGeometry:
        return self.model.geometry

    @property
    def kv_dtype(self) -> torch.dtype:
        """What a KVCache, which torch or a GPU's kernels read, is of."""
        return _KV_DTYPES[self.kv_cache_dtype]


def load_model(
    config: EngineConfig,
    progress: Progress,
    available_bytes: int | None = None,
    shard: Shard = WHOLE,
) -> LoadedModel:
    """Load the model of `config.model_path` as `config` says, or a `shard` of it.

    `available_bytes`: memory to fit into; what the device really has if None. Ranks but the first
    load when that one has, and rely on what it found. Raises ModelError (every kind of it) and
    ConfigError.
    """
    folder = config.model_path
    started = time.monotonic()
    model_config = read_model_config(folder)
    device = choose_device(config.device, shard.rank_here, shard.ranks_here, config.first_device)
    dtype, reason = _choose_dtype(config, model_config, device)
    limit = check_max_model_len(config.max_model_len, model_config)
    dummy = config.load_format == "dummy"
    scheme = None if dummy else read_quantisation(folder)
    checkpoint = None if dummy else Checkpoint.open(folder, scheme)
    if checkpoint is not None and model_config.tie_word_embeddings:
        model_config = replace(model_config, tie_word_embeddings=_really_tied(checkpoint))
    fp8 = check_fp8(config, model_config, dtype, device) or keeps_fp8(
        config, scheme, model_config, dtype, device
    )
    packing = choose_packing(config, model_config, dtype, device)
    check_division(
        model_config, packing, config.tensor_parallel_size, config.enable_expert_parallel
    )
    if packing is not None and checkpoint is not None and keeps_int4(config, scheme, packing):
        packing = replace(packing, int4_groups=checkpoint.int4_groups())
    quantization = "fp8" if fp8 else "none" if packing is None else packing.name
    if quantization == "int8" and config.quantization == "auto":
        reason += "; int8, as --quantization auto chooses on a CPU"
    kv = choose_kv_cache_dtype(config, dtype, packing)
    inventory = InventorySource(dtype, packing, fp8)
    if model_config.family == "transformers":
        numbers = (
            checkpoint.numbers if checkpoint else count_numbers(folder, model_config.architecture)
        )
        weight_bytes = numbers * dtype.itemsize
    else:
        build(model_config, inventory)
        weight_bytes = inventory.bytes
        if checkpoint is not None:
            tied = frozenset(("lm_head.weight",) if model_config.tie_word_embeddings else ())
            checkpoint.check(inventory.shapes, ignored=tied)
    if scheme is not None:
        reason += f"; the checkpoint is {scheme.description}"
        if packing is not None and keeps_int4(config, scheme, packing):
            reason += f", {_kept(inventory)} stay so (docs/quantisation.md says which)"
    each = shard.ranks if device.type == "cuda" else 1  # ranks with memory of their own
    kv_bytes = kv_block_bytes(kv, model_config.kv_geometry, config.block_size, packing is not None)
    check_fits(
        weight_bytes=weight_bytes // each,
        kv_bytes_per_token=kv_bytes // config.block_size // each,
        max_model_len=config.max_model_len or min(LEAST_MODEL_LEN, limit),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        available_bytes=available_device_bytes(device, config.memory_share)
        if available_bytes is None
        else available_bytes,
        dtype=_name(dtype),
    )
    _done(progress, f"config: {model_config.architecture}, {_name(dtype)} ({reason})", started)

    started = time.monotonic()
    model: CausalLM
    mapped_bytes, where = 0, f"on {device}"
    if model_config.family == "transformers":
        seed = config.seed if dummy else None
        model = load_fallback(folder, model_config, dtype, device, seed)
    elif packing is None:
        if shard.ranks > 1:
            where += f", shared by {shard.ranks} ranks"
        with _source(config, checkpoint, dtype, device, shard) as source:
            model = build(model_config, Fp8Source(source) if fp8 else source)
    else:
        open_source = partial(_packing_source, config, checkpoint, dtype, packing)
        mapped, where = _mapped(config, checkpoint, inventory, open_source, shard.rank_here > 0)
        with open_source() if mapped is None else nullcontext(mapped) as source:
            if shard.ranks > 1:
                source = ShardSource(source, shard, keep_views=mapped is not None)
                where += f", shared by {shard.ranks} ranks"
            model = build(model_config, source)
        mapped_bytes = 0 if mapped is None else mapped.num_bytes
    kind = "random weights" if dummy else "weights"
    if quantization != "none":
        kind = f"{quantization} {kind}"
    _done(progress, f"{kind}: {gib(weight_bytes)} {where}", started)
    return LoadedModel(
        model=model,
        config=model_config,
        dtype=dtype,
        device=device,
        weight_bytes=weight_bytes,
        quantization=quantization,
        kv_cache_dtype=kv,
        packed=packing is not None,
        shard=shard,
        mapped_bytes=mapped_bytes,
    )


@dataclass(frozen=True, slots=True)
class Division:
    """What ranks are to share."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device  # rank 0's
    packed: bool  # for the CPU's kernels; else torch or a GPU's kernels run it


def check_ranks(config: EngineConfig) -> Division:
    """What `config.tensor_parallel_size` ranks are to share.

    Raises ConfigError if they cannot, before anything is read but config.json."""
    model = read_model_config(config.model_path)
    device = choose_device(
        config.device, 0, config.tensor_parallel_size // config.nnodes, config.first_device
    )
    dtype, _ = _choose_dtype(config, model, device)
    check_fp8(config, model, dtype, device)
    packing = choose_packing(config, model, dtype, device)
    check_division(model, packing, config.tensor_parallel_size, config.enable_expert_parallel)
    return Division(model, dtype, device, packing is not None)


def _choose_dtype(
    config: EngineConfig, model: ModelConfig, device: torch.device
) -> tuple[torch.dtype, str]:
    """The type of weights and activations, and why."""
    quantisable = device.type == "cpu" and model.family != "transformers"
    return choose_dtype(
        config.dtype,
        model.checkpoint_dtype,
        device,
        fast_bf16=True if quantisable and config.quantization != "none" else None,
    )


def _source(
    config: EngineConfig,
    checkpoint: Checkpoint | None,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
) -> AbstractContextManager[WeightSource]:
    if checkpoint is None:
        return nullcontext(DummySource(config.seed, dtype, device, shard))
    return CheckpointSource(checkpoint, dtype, device, shard)


@contextmanager
def _packing_source(
    config: EngineConfig, checkpoint: Checkpoint | None, dtype: torch.dtype, packing: Packing
) -> Iterator[WeightSource]:
    with _source(config, checkpoint, dtype, torch.device("cpu")) as source:
        yield PackingSource(source, packing)


def _mapped(
    config: EngineConfig,
    checkpoint: Checkpoint | None,
    inventory: InventorySource,
    open_source: Callable[[], AbstractContextManager[WeightSource]],
    checked: bool,
) -> tuple[MappedWeights | None, str]:
    """The packed weights as a file of the cache, None if they can be none; and that in words."""
    folder = cache_folder(config.packed_cache)
    if folder is None or inventory.bytes < LEAST_BYTES:
        return None, "in memory"
    if checkpoint is None:
        identity: list[object] = ["random numbers", config.seed, torch.__version__]
    else:
        identity = checkpoint_identity(checkpoint)
        if checkpoint.scheme is not None:
            identity.append(repr(checkpoint.scheme))
    name = "".join(c if c.isalnum() else "-" for c in config.model_path.name)[:60] or "model"
    cache = PackedCache(folder, config.packed_cache_bytes)
    try:
        found, path, written = cache.weights(
            name, identity, inventory.plan, inventory.dtype, open_source, checked
        )
    except UncachedError as reason:
        return None, f"in memory, as the packed cache cannot have them: {reason}"
    return found, f"{'packed into' if written else 'mapped from'} {path}"


def choose_packing(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Packing | None:
    """How the CPU's kernels want this model, None if torch is to run it.

    `auto` is int8 where nobody named a type either: the fastest that is as good as exact.
    Raises ConfigError where quantisation is asked for and they cannot run it.
    """
    obstacle = None
    if device.type != "cpu":
        obstacle = f"runs on a CPU here, and the model is on {device.type}"
    elif model.family == "transformers":
        obstacle = f"has no kernels for {model.architecture}, which transformers' code runs"
    elif dtype != torch.bfloat16:
        obstacle = f"needs --dtype bfloat16, not {_name(dtype)}"
    elif config.kv_cache_dtype == "float32":
        obstacle = "needs a KV cache of bfloat16 or int8"
    elif config.block_size % 16:
        obstacle = f"needs a --block-size that 16 divides, not {config.block_size}"
    elif model.head_dim % 2:
        obstacle = f"needs heads of even width, not {model.head_dim}"
    if obstacle is None:
        named = config.quantization != "auto" or config.dtype != "auto"
        return Packing(config.quantization.replace("auto", "none") if named else "int8")
    for flag, value in (
        ("quantization", config.quantization),
        ("kv-cache-dtype", config.kv_cache_dtype),
    ):
        if value in ("int8", "int4"):
            raise ConfigError(f"--{flag} {value} {obstacle}")
    return None


def check_fp8(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether weights become fp8. Raises ConfigError where they, or the cache, shall and cannot."""
    flags = {"quantization": config.quantization, "kv-cache-dtype": config.kv_cache_dtype}
    for flag, value in flags.items():
        if value == "fp8" and (obstacle := fp8_obstacle(device, model.family, dtype)) is not None:
            raise ConfigError(f"--{flag} fp8 {obstacle}")
    return config.quantization == "fp8"


def keeps_fp8(
    config: EngineConfig,
    scheme: Scheme | None,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether a checkpoint of fp8 stays so because nobody asked for anything else and it can."""
    return (
        config.quantization == "auto"
        and isinstance(scheme, ScaledBytes)
        and scheme.dtype == "F8_E4M3"
        and fp8_obstacle(device, model.family, dtype) is None
    )


def keeps_int4(config: EngineConfig, scheme: Scheme | None, packing: Packing) -> bool:
    """Whether a checkpoint's int4 stays so: where nobody asked for another format of weights."""
    chosen = packing.quantization == "int8" and config.quantization == "auto"
    return isinstance(scheme, Grouped) and (chosen or packing.quantization == "int4")


def _kept(inventory: InventorySource) -> str:
    """How many matrices are laid out as the checkpoint's int4 numbers."""
    formats = [part.layout.format for part in inventory.plan if isinstance(part, MatrixPart)]
    return f"{formats.count(INT4_ZEROS)} of {len(formats)} matrices"


def _really_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output layer is the embedding, as config.json says.

    A checkpoint that has both, and different, is right against its config.json: so transformers.
    """
    both = ("model.embed_tokens.weight", "lm_head.weight")
    if not all(name in checkpoint.tensors for name in both):
        return True
    with CheckpointSource(checkpoint, torch.float32, torch.device("cpu")) as source:
        embedding, output = (source.stored(name) for name in both)
        return embedding.dtype == output.dtype and torch.equal(embedding, output)


def check_max_model_len(requested: int | None, config: ModelConfig) -> int:
    """The most tokens the model's positions reach. Raises ConfigError if more are requested."""
    limit = config.max_position_embeddings
    if config.rope.kind == "yarn":
        limit = max(limit, int(config.rope.original_max_position * config.rope.factor))
    if requested is not None and requested > limit:
        raise ConfigError(
            f"--max-model-len {requested} is more than the {limit} positions of "
            f"{config.architecture}'s config.json"
        )
    return limit


def choose_kv_cache_dtype(
    config: EngineConfig, model_dtype: torch.dtype, packing: Packing | None
) -> str:
    """The type of cached keys and values; `auto` is int8 where weights are integers on a CPU."""
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    if packing is not None and packing.quantization != "none":
        return "int8"
    return _name(model_dtype)


def kv_block_bytes(name: str, geometry: KVGeometry, block_size: int, packed: bool) -> int:
    """Bytes of one KV block in all layers; `name` as of LoadedModel."""
    if packed:
        return PackedKVCache.block_bytes(geometry, block_size, name)
    return geometry.bytes_per_token(_KV_DTYPES[name]) * block_size


def available_device_bytes(device: torch.device, share: float = 1.0) -> int:
    """Memory that is free, of a GPU at most the `share` that may be used."""
    if device.type == "cpu":
        return available_cpu_bytes()
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(share * total))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _done(progress: Progress, phase: str, started: float) -> None:
    progress(phase, time.monotonic() - started)
