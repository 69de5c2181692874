"""Ranks of several hosts give the bits of one: here as processes that share no memory."""

import contextlib
import random
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError, EngineError
from scalellm.executor.batch import Batch, Span
from scalellm.executor.load import load_executor

HERE = "127.0.0.1"
BLOCK, VOCAB = 16, 275
BATCHES = (
    Batch((Span(list(range(40)), 0, range(3), 40), Span([7] * 9, 0, [5], 1))),
    Batch((Span([3], 40, range(3), 1), Span([4], 9, [5], 1))),
)


def made(folder, seed):
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("mixtral"), seed=0)


def load(folder, **settings):
    usual = {"dtype": "bfloat16", "quantization": "int8", "cpu_threads": 1}
    return load_executor(
        EngineConfig(
            model_path=folder,
            device="cpu",
            block_size=BLOCK,
            kv_cache_memory_bytes=4 << 20,
            max_num_batched_tokens=64,
            **usual | settings,
        )
    )


def results(executor):
    """Logits of a prompt and of a decode step, and greedy ids of both."""
    logits = [executor.forward(batch).clone() for batch in BATCHES]
    return torch.cat(logits), [executor.greedy(batch) for batch in BATCHES]


def alone(folder, **settings):
    executor = load(folder, **settings)
    try:
        return results(executor)
    finally:
        executor.close()


def free_port():
    """Not of those that the system gives to connections: one that looks for rank 0 before that
    listens could be given the port that it looks at, and find itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server((HERE, port)):
            return port


def other_host(folder, port, ranks=2):
    """As `scalellm engine` runs on the second of two hosts."""
    command = [sys.executable, "-m", "scalellm", "engine", str(folder), "--nnodes=2"]
    command += ["--node-rank=1", f"--master-addr={HERE}", f"--master-port={port}"]
    command += [f"--tensor-parallel-size={ranks}"]
    return subprocess.Popen([*command, "--cpu-threads=1"])


def two_hosts(port, ranks=2):
    """Settings of the first of them."""
    there = {"nnodes": 2, "master_addr": HERE, "master_port": port}
    return {"tensor_parallel_size": ranks, **there}


def on_two_hosts(folder, ranks=2, **settings):
    """`results` of ranks half of which are another host's."""
    port = free_port()
    with other_host(folder, port, ranks) as other:
        try:
            several = load(folder, **two_hosts(port, ranks), **settings)
            try:
                assert len(several.rank_pids) == ranks // 2 - 1, "of this host"
                found = results(several)
            finally:
                several.close()
        finally:
            other.terminate()
    assert other.returncode == 0
    return found


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(2, {}), (2, {"enable_expert_parallel": True}), (4, {}), (2, {"enforce_eager": True})],
    ids=str,
)
def test_two_hosts_give_the_bits_of_one(folder, ranks, settings):
    expected, expected_ids = alone(folder)
    logits, ids = on_two_hosts(folder, ranks, **settings)
    assert torch.equal(logits, expected)
    assert ids == expected_ids or settings.get("enforce_eager")


def test_hosts_of_torchs_ranks_are_close_to_one(folder):
    """By gloo, whose sums have another order."""
    settings = {"dtype": "float32", "quantization": "none"}
    expected, _ = alone(folder, **settings)
    logits, _ = on_two_hosts(folder, **settings)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_host_that_is_gone_ends_the_replica(folder, how):
    port = free_port()
    with other_host(folder, port) as other:
        try:
            several = load(folder, **two_hosts(port))
        finally:
            getattr(other, how)()  # and its rank with it
        # Whichever comes first: the end of its connection, or of a step.
        said = "lost a rank: (rank 1, on another host, has ended|a rank has failed)"
        with pytest.raises(EngineError, match=said):
            while True:
                several.forward(BATCHES[0])
                several.check()
        several.close()


@pytest.mark.parametrize("settings", [{}, {"quantization": "none"}], ids=str)
def test_a_host_with_another_revision_of_the_model_is_refused(folder, tmp_path, settings):
    port = free_port()
    with other_host(made(tmp_path, seed=1), port) as other:
        try:
            with pytest.raises(EngineError, match=r"rank 1 could not load: .* another revision"):
                load(folder, **two_hosts(port), **settings)
        finally:
            other.terminate()


def test_an_engine_that_starts_anew_finds_the_other_host_again(folder):
    expected, _ = alone(folder)
    port = free_port()
    with other_host(folder, port) as other:
        try:
            for _ in range(2):
                several = load(folder, **two_hosts(port))
                logits, _ = results(several)
                several.close()
                assert torch.equal(logits, expected)
        finally:
            other.terminate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 4, "nnodes": 3}, "--nnodes: got 3, allowed: what divides"),
        ({"nnodes": 2}, "--nnodes: got 2, allowed: what divides --tensor-parallel-size 1"),
        (
            {"tensor_parallel_size": 2, "nnodes": 2, "node_rank": 2},
            "--node-rank: got 2, allowed: below --nnodes 2",
        ),
        (
            {"tensor_parallel_size": 2, "nnodes": 2, "node_rank": 1},
            "--master-addr: missing, needed with --nnodes 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_executor(EngineConfig(model_path=folder, device="cpu", **settings))
