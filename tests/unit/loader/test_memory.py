"""Memory: what is really free, what fits, and the advice when it does not."""

import pytest
import torch

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError, OutOfMemoryError
from scalellm.executor.single import SingleExecutor
from scalellm.loader.load import load_model
from scalellm.loader.memory import available_cpu_bytes, check_fits, gib, size_kv_cache

GIB = 1 << 30


def machine(root, meminfo_kb, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {meminfo_kb} kB\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_available_without_control_groups(tmp_path):
    assert available_cpu_bytes(machine(tmp_path, 1000, {})) == 1000 * 1024


def test_available_within_nested_groups(tmp_path):
    """The parent's limit is the narrower one; its idle file pages count as free."""
    root = machine(
        tmp_path,
        8 << 20,
        {
            "proc/self/cgroup": "0::/app/engine\n",
            "sys/fs/cgroup/app/engine/memory.max": "max\n",
            "sys/fs/cgroup/app/engine/memory.current": "100\n",
            "sys/fs/cgroup/app/memory.max": "5000\n",
            "sys/fs/cgroup/app/memory.current": "3000\n",
            "sys/fs/cgroup/app/memory.stat": "anon 2300\ninactive_file 700\n",
        },
    )
    assert available_cpu_bytes(root) == 2700


def test_available_in_a_container_that_sees_its_group_as_the_root(tmp_path):
    root = machine(
        tmp_path,
        8 << 20,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "9000\n",
            "sys/fs/cgroup/memory.current": "4000\n",
        },
    )
    assert available_cpu_bytes(root) == 5000


def test_available_in_a_first_version_group(tmp_path):
    root = machine(
        tmp_path,
        8 << 20,
        {
            "proc/self/cgroup": "3:cpu:/x\n7:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "6000\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 10\n",
        },
    )
    assert available_cpu_bytes(root) == 5010


def test_this_machine_has_memory():
    assert 1 << 20 < available_cpu_bytes() < 1 << 50


def fits(**changes):
    check_fits(
        **{
            "weight_bytes": 8 * GIB,
            "kv_bytes_per_token": 1 << 20,
            "max_model_len": 1024,
            "kv_cache_memory_bytes": None,
            "available_bytes": 9 * GIB,
            "dtype": "float32",
            **changes,
        }
    )


def test_what_fits_exactly_passes():
    fits()


def test_weights_too_big():
    with pytest.raises(OutOfMemoryError) as refused:
        fits(available_bytes=4 * GIB)
    message = str(refused.value)
    assert "needs 9.0 GiB (8.0 GiB of float32 weights, 1.0 GiB of KV cache)" in message
    assert "4.0 GiB available" in message
    assert "--dtype bfloat16" in message
    assert "--max-model-len" not in message, "no context is small enough"


def test_cache_too_big():
    with pytest.raises(OutOfMemoryError, match="--max-model-len"):
        fits(max_model_len=1025)
    with pytest.raises(OutOfMemoryError, match="--kv-cache-memory"):
        fits(kv_cache_memory_bytes=2 * GIB)


def test_bf16_is_not_advised_to_who_has_it():
    with pytest.raises(OutOfMemoryError) as refused:
        fits(dtype="bfloat16", available_bytes=GIB)
    assert "--dtype" not in str(refused.value)


def size(**changes):
    return size_kv_cache(
        **{
            "block_bytes": 16_000,
            "block_size": 16,
            "max_model_len": None,
            "model_limit": 4096,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": None,
            "budget_bytes": 100_000_000,
            **changes,
        }
    )


def test_cache_takes_the_budget_up_to_what_is_of_use():
    assert size(budget_bytes=10_000_000).num_blocks == 625
    assert size(budget_bytes=10**12).num_blocks == 2 * 8 * 256


def test_explicit_size_wins():
    assert size(kv_cache_memory_bytes=8_000_000).num_blocks == 500


def test_open_context_shrinks_to_the_memory():
    found = size(budget_bytes=3_200_000)
    assert (found.num_blocks, found.max_model_len) == (200, 3200)


def test_requested_context_does_not_shrink():
    with pytest.raises(OutOfMemoryError, match="one request of 4000 tokens needs 4 MiB"):
        size(max_model_len=4000, budget_bytes=3_200_000)
    with pytest.raises(OutOfMemoryError, match="a larger --kv-cache-memory"):
        size(max_model_len=4000, kv_cache_memory_bytes=3_200_000)


def test_context_does_not_shrink_to_uselessness():
    with pytest.raises(OutOfMemoryError, match="one request of 2048 tokens"):
        size(budget_bytes=1_600_000)


def test_sizes_for_people():
    assert gib(3 * GIB // 2) == "1.5 GiB"
    assert gib(5 << 20) == "5 MiB"


def test_model_is_refused_before_its_weights_are_read(make_folder):
    phases = []
    config = EngineConfig(model_path=make_folder(), device="cpu")
    with pytest.raises(OutOfMemoryError, match="available"):
        load_model(config, lambda phase, _: phases.append(phase), available_bytes=10_000)
    assert phases == []


def test_dummy_weights_are_checked_too(make_folder):
    config = EngineConfig(model_path=make_folder(weights=None), load_format="dummy", device="cpu")
    with pytest.raises(OutOfMemoryError):
        load_model(config, lambda *_: None, available_bytes=10_000)


def test_context_beyond_the_model_is_refused(make_folder):
    config = EngineConfig(model_path=make_folder(), device="cpu", max_model_len=65)
    with pytest.raises(ConfigError, match="more than the 64 positions"):
        SingleExecutor.load(config)


def test_phases_are_reported(make_folder):
    phases = []
    config = EngineConfig(model_path=make_folder(), device="cpu", kv_cache_memory_bytes=1 << 20)
    executor = SingleExecutor.load(config, lambda phase, seconds: phases.append((phase, seconds)))
    assert [phase.split(":")[0] for phase, _ in phases] == ["config", "weights", "KV cache"]
    assert all(seconds >= 0 for _, seconds in phases)
    assert f"{executor.num_blocks} blocks" in phases[-1][0]


def test_a_gpu_that_is_full_says_what_would_help(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee docs")

    monkeypatch.setattr(SingleExecutor, "_load", full)
    with pytest.raises(OutOfMemoryError) as raised:
        SingleExecutor.load(EngineConfig(quantization="none", max_num_batched_tokens=9000))
    message = str(raised.value)
    assert "its largest step, of 9000 tokens and 256 sequences" in message
    assert "a smaller --max-num-batched-tokens" in message and "--quantization fp8" in message
    assert message.endswith("torch: CUDA out of memory. Tried to allocate 2 GiB.")
