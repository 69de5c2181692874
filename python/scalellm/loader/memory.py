"""How much memory there really is, and what of it the KV cache gets."""

from dataclasses import dataclass
from pathlib import Path

from scalellm.config import EngineConfig
from scalellm.errors import OutOfMemoryError

GIB = 1 << 30
# A CPU's memory is shared with the gateway, the system and activations: half of what is free.
CPU_KV_SHARE = 0.5
# The default context length gives way to the memory there is, down to this.
LEAST_MODEL_LEN = 2048


@dataclass(frozen=True, slots=True)
class KVSize:
    """The size of the KV cache, and the longest request that fits into it."""

    num_blocks: int
    max_model_len: int


def available_cpu_bytes(root: Path = Path("/")) -> int:
    """Memory this process can still use: what the kernel can free, within its control groups."""
    meminfo = (root / "proc/meminfo").read_text()
    available = next(
        int(line.split()[1]) * 1024
        for line in meminfo.splitlines()
        if line.startswith("MemAvailable:")
    )
    return min([available, *_cgroup_headrooms(root)])


def _cgroup_headrooms(root: Path) -> list[int]:
    """Limit minus use of this process's memory groups and their parents, cgroup v2 and v1."""
    groups = root / "proc/self/cgroup"
    if not groups.is_file():
        return []
    headrooms = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, idle = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = "memory", "memory.limit_in_bytes"
            used, idle = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / base
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != top and top not in folder.parents:
                break
            maximum, current = _number(folder / limit), _number(folder / used)
            if maximum is not None and current is not None:
                headrooms.append(max(0, maximum - current + _stat(folder / "memory.stat", idle)))
    return headrooms


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _stat(file: Path, name: str) -> int:
    """File pages that the kernel drops when a group runs full."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def check_fits(
    *,
    weight_bytes: int,
    kv_bytes_per_token: int,
    max_model_len: int,
    kv_cache_memory_bytes: int | None,
    available_bytes: int,
    dtype: str,
) -> None:
    """Raise OutOfMemoryError unless weights and the least useful KV cache fit.

    Called before weights are read. `max_model_len`: tokens the cache must hold at the least.
    """
    kv_bytes = kv_cache_memory_bytes or kv_bytes_per_token * max_model_len
    needed = weight_bytes + kv_bytes
    if needed <= available_bytes:
        return
    advice = []
    if weight_bytes <= available_bytes:
        if kv_cache_memory_bytes is not None:
            advice.append("a smaller --kv-cache-memory")
        advice.append("a smaller --max-model-len")
    if dtype == "float32":
        advice.append("--dtype bfloat16 (half the size)")
    advice.append("a machine with more memory" if weight_bytes > available_bytes else "more memory")
    raise OutOfMemoryError(
        f"the model does not fit: needs {gib(needed)} ({gib(weight_bytes)} of {dtype} weights, "
        f"{gib(kv_bytes)} of KV cache), {gib(available_bytes)} available; "
        f"what helps: {', or '.join(advice)}"
    )


def explained(error: Exception, config: EngineConfig) -> OutOfMemoryError:
    """What to do about a GPU that had not enough memory when the model was loaded."""
    advice = ["a smaller --max-num-batched-tokens", "fewer --max-num-seqs"]
    if config.quantization not in ("fp8", "auto"):
        advice.append("--quantization fp8")
    advice += ["a larger --tensor-parallel-size", "to end what else uses the GPU"]
    return OutOfMemoryError(
        f"the GPU's memory does not hold the model and its largest step, of "
        f"{config.max_num_batched_tokens} tokens and {config.max_num_seqs} sequences; what helps: "
        f"{', or '.join(advice)}. torch: {str(error).splitlines()[0]}"
    )


def size_kv_cache(
    *,
    block_bytes: int,
    block_size: int,
    max_model_len: int | None,
    model_limit: int,
    max_num_seqs: int,
    kv_cache_memory_bytes: int | None,
    budget_bytes: int,
) -> KVSize:
    """Choose the number of blocks, and max_model_len where it was left open.

    `budget_bytes`: what may be used unless `kv_cache_memory_bytes` says otherwise. Not more is
    taken than twice what max_num_seqs requests of full length could fill, the second half for
    prefixes worth keeping. Raises OutOfMemoryError if not even one request of `max_model_len`
    tokens fits.
    """
    wanted = model_limit if max_model_len is None else max_model_len
    useful = 2 * max_num_seqs * -(-wanted // block_size)
    num_blocks = min((kv_cache_memory_bytes or budget_bytes) // block_bytes, useful)
    tokens = num_blocks * block_size
    if tokens >= wanted:
        return KVSize(num_blocks, wanted)
    if max_model_len is None and tokens >= min(LEAST_MODEL_LEN, model_limit):
        return KVSize(num_blocks, tokens)
    least = min(wanted, max_model_len or LEAST_MODEL_LEN)
    flag = "--kv-cache-memory" if kv_cache_memory_bytes else "--max-model-len"
    raise OutOfMemoryError(
        f"the KV cache does not fit: one request of {least} tokens needs "
        f"{gib(-(-least // block_size) * block_bytes)}, "
        f"{gib(kv_cache_memory_bytes or budget_bytes)} available; what helps: "
        + ("a larger --kv-cache-memory, or " if flag == "--kv-cache-memory" else "")
        + "a smaller --max-model-len"
    )


def gib(size_bytes: int) -> str:
    """A size for people, e.g. "1.4 GiB"; MiB below one."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.0f} MiB"
