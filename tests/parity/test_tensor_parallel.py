"""Several ranks give the bits of one, and end together."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from scalellm import LLM, SamplingParams
from scalellm.config import EngineConfig
from scalellm.errors import ConfigError, EngineError
from scalellm.executor.batch import Batch, Span
from scalellm.executor.followers import Followers
from scalellm.executor.load import load_executor

BLOCK = 16
TOKENS = 70
VOCAB = 275  # no whole panels of 32, so that ranks have unequal shares
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    # 36 columns of gate and up for each of 8 ranks: less than three panels.
    "dense": LlamaConfig(**TINY, intermediate_size=288, attention_bias=True, mlp_bias=True),
    "dense-int4": LlamaConfig(**TINY, intermediate_size=512),
    "mixtral": MixtralConfig(
        **TINY, intermediate_size=288, num_experts_per_tok=2, num_local_experts=4
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **TINY,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_experts_per_tok=3,
        num_experts=8,
        mlp_only_layers=[0],
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a model of random weights, made once."""
    made: dict[str, Path] = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name])
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
                    parameter.mul_(parameter.dim() == 1).add_(scale * noise)
            made[name] = tmp_path_factory.mktemp(name)
            model.bfloat16().save_pretrained(made[name])
        return made[name]

    return make


def load(folder, ranks=1, **settings):
    usual = {"dtype": "bfloat16", "device": "cpu", "block_size": BLOCK, "cpu_threads": ranks}
    return load_executor(
        EngineConfig(
            model_path=folder,
            kv_cache_memory_bytes=8 << 20,
            max_num_batched_tokens=128,
            tensor_parallel_size=ranks,
            **usual | settings,
        )
    )


def ids_of(count, seed=1):
    random = Random(seed)
    return [random.randrange(VOCAB) for _ in range(count)]


def results(executor):
    """Logits and greedy ids of a prompt at once, in chunks, and token by token beside another."""
    ids, other = ids_of(TOKENS), ids_of(40, seed=2)
    found = [executor.forward(Batch((Span(ids, 0, range(5), TOKENS),))).clone()]
    table, beside = range(10, 16), range(20, 24)
    for first, last in ((0, 7), (7, 39), (39, 40), (40, 60)):
        spans = (Span(other[:33], 0, beside, 0), Span(ids[first:last], first, table, last - first))
        found.append(executor.forward(Batch(spans)).clone())
    for position in range(60, 63):
        spans = (Span(other[33:34], 33, beside, 1), Span(ids[position:][:1], position, table, 1))
        found.append(executor.forward(Batch(spans)).clone())
    greedy = executor.greedy(Batch((Span(ids, 0, range(30, 35), TOKENS),)))
    return torch.cat(found), greedy


def assert_equal_bits(folder, ranks, **settings):
    one = load(folder, quantization=settings.get("quantization", "auto"))
    several = load(folder, ranks, **settings)
    try:
        eager = settings.get("enforce_eager", False)
        assert several.recorded is not eager
        (expected, expected_ids), (logits, ids) = results(one), results(several)
        assert torch.equal(logits, expected)
        assert expected_ids is not None and ids == (None if eager else expected_ids)
        # Key-value heads are split, or, where there are more ranks, on several of them.
        assert several.num_blocks == one.num_blocks // max(1, ranks // 2)
    finally:
        several.close()
        one.close()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_int8(folder_of, ranks):
    assert_equal_bits(folder_of("dense"), ranks, quantization="int8")


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "int4"},
        {"quantization": "none"},
        {"quantization": "int8", "enforce_eager": True},
    ],
    ids=str,
)
def test_other_weights_and_eager_steps(folder_of, settings):
    assert_equal_bits(folder_of("dense-int4"), 2, **settings)


@pytest.mark.parametrize(("model", "ranks"), [("mixtral", 4), ("qwen3-moe", 2)])
@pytest.mark.parametrize("by", ["each", "whole"])
def test_experts(folder_of, model, ranks, by):
    """Of which ranks divide each, or have whole ones."""
    settings = {"enable_expert_parallel": by == "whole"}
    assert_equal_bits(folder_of(model), ranks, quantization="int8", **settings)


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, {"dtype": "float32"}], ids=str)
def test_how_evenly_experts_are_used_is_the_same_by_kernels_and_by_torch(folder_of, settings):
    """Counted by a recorded plan, or by torch; of this model's layers the first is dense, and the
    last, the other one, computes what logits are asked for."""
    batch = Batch((Span(ids_of(TOKENS), 0, range(5), TOKENS),))
    executor = load(folder_of("qwen3-moe"), **settings)
    try:
        executor.forward(batch)
        layers, read, busiest, choices, ranks = executor.expert_use()
    finally:
        executor.close()
    assert (layers, ranks, len(choices)) == (1, 1, 8)
    assert sum(choices) == 3 * TOKENS
    assert read == sum(count > 0 for count in choices) and busiest == max(choices)


def test_the_busiest_of_ranks_that_divide_the_experts(folder_of):
    batch = Batch((Span(ids_of(TOKENS), 0, range(5), TOKENS),))
    settings = {"quantization": "int8", "enable_expert_parallel": True}
    executor = load(folder_of("qwen3-moe"), 2, **settings)
    try:
        executor.greedy(batch)
        layers, _, busiest, choices, ranks = executor.expert_use()
    finally:
        executor.close()
    assert (layers, ranks) == (1, 2)
    assert busiest == max(sum(choices[:4]), sum(choices[4:]))


def test_a_dense_model_has_no_experts_to_tell_of(folder_of):
    executor = load(folder_of("dense"))
    try:
        executor.forward(Batch((Span([1, 2, 3], 0, [0], 1),)))
        assert executor.expert_use() is None
    finally:
        executor.close()


def test_experts_in_eager_steps(folder_of):
    assert_equal_bits(
        folder_of("mixtral"),
        2,
        quantization="int8",
        enable_expert_parallel=True,
        enforce_eager=True,
    )


def test_tokens_of_requests_that_preempt_each_other(folder_of):
    prompts = [{"prompt_token_ids": ids_of(20 + 5 * i, seed=i)} for i in range(6)]
    params = [
        SamplingParams(max_tokens=30, temperature=i % 2, seed=i, ignore_eos=True, logprobs=2)
        for i in range(6)
    ]
    found = []
    for ranks, settings in ((1, {}), (2, {"max_num_batched_tokens": 32})):
        llm = LLM(
            str(folder_of("dense")),
            tensor_parallel_size=ranks,
            quantization="int8",
            block_size=BLOCK,
            kv_cache_memory_bytes=100 << 10,
            max_model_len=128,
            cpu_threads=ranks,
            **settings,
        )
        with llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm._engine.listener.load[8] > 0, "preempted"
        found.append([(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs])
    assert found[0] == found[1]


# ------------------------------------------------------------ by torch, over gloo


@pytest.mark.parametrize(
    ("model", "ranks", "settings"),
    [
        ("dense", 2, {}),
        ("dense", 4, {}),
        ("mixtral", 2, {}),
        ("qwen3-moe", 2, {"enable_expert_parallel": True}),
        ("dense-int4", 2, {"dtype": "bfloat16", "kv_cache_dtype": "float32"}),
    ],
    ids=str,
)
def test_ranks_of_torch_are_close_to_one(folder_of, model, ranks, settings):
    """Sums have another order, so bits differ."""
    settings = {"dtype": "float32"} | settings
    alone = {k: v for k, v in settings.items() if k != "enable_expert_parallel"}
    one, several = load(folder_of(model), **alone), load(folder_of(model), ranks, **settings)
    try:
        assert not several.recorded
        (expected, _), (logits, ids) = results(one), results(several)
        assert ids is None
        tolerance = 1e-3 if settings["dtype"] == "float32" else 0.1
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        assert several.num_blocks == one.num_blocks // max(1, ranks // 2)
    finally:
        several.close()
        one.close()


def test_a_killed_rank_of_torch_ends_the_replica(folder_of):
    executor = load(folder_of("dense"), 2, dtype="float32")
    try:
        os.kill(executor.rank_pids[0], signal.SIGKILL)
        with pytest.raises(EngineError, match="lost a rank"):
            while True:
                with contextlib.suppress(RuntimeError):  # gloo's, before the reason is known
                    executor.forward(Batch((Span(ids_of(TOKENS), 0, range(5), 1),)))
    finally:
        executor.close()


# ------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("dense", {"tensor_parallel_size": 3}, "it can be 1, 2, 4, 8; what fits: 1, 2, 4, 8"),
        ("dense", {"tensor_parallel_size": 2, "quantization": "int4"}, "the 288 inputs of the MLP"),
        ("dense", {"enable_expert_parallel": True}, "has no experts"),
        (
            "mixtral",
            {"tensor_parallel_size": 8, "enable_expert_parallel": True},
            "4 experts are not divisible by it; what fits: 1, 2, 4",
        ),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_starts(
    folder_of, monkeypatch, model, settings, message
):
    monkeypatch.setattr(Followers, "__init__", lambda *_: pytest.fail("ranks were started"))
    config = EngineConfig(
        **{"model_path": folder_of(model), "dtype": "bfloat16", "device": "cpu"} | settings
    )
    with pytest.raises(ConfigError, match=message):
        load_executor(config)


def test_heads_that_do_not_divide_are_named(tmp_path):
    config = LlamaConfig(**TINY | {"num_attention_heads": 4}, intermediate_size=256)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    settings = {"load_format": "dummy", "dtype": "bfloat16", "device": "cpu"}
    with pytest.raises(ConfigError, match=r"4 attention heads .* what fits: 1, 2, 4"):
        load_executor(EngineConfig(model_path=tmp_path, tensor_parallel_size=8, **settings))


# ------------------------------------------------------------ ends


def ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_rank_ends_the_replica(folder_of):
    executor = load(folder_of("dense"), 4, quantization="int8")
    ids, pids = ids_of(TOKENS), executor.rank_pids
    try:
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineError, match="lost a rank: rank 2 was killed by SIGKILL"):
            while True:  # steps may succeed until the news is here; none waits for ever
                executor.forward(Batch((Span(ids, 0, range(5), 1),)))
        with pytest.raises(EngineError, match="killed by SIGKILL"):
            executor.check()
    finally:
        executor.close()
    assert all(map(ended, pids))


def test_requests_end_with_an_error_when_a_rank_is_killed(folder_of):
    before = set(psutil.Process().children())
    with LLM(
        str(folder_of("dense")), tensor_parallel_size=2, quantization="int8", cpu_threads=2
    ) as llm:
        [rank] = set(psutil.Process().children()) - before
        stream = llm.stream({"prompt_token_ids": [5]}, SamplingParams(ignore_eos=True))
        rank.kill()
        with pytest.raises(EngineError):
            for _ in stream:
                pass
        with pytest.raises(EngineError):
            while True:
                llm.generate({"prompt_token_ids": [5]}, SamplingParams(max_tokens=1), False)


PARENT = """
import sys
from pathlib import Path
from scalellm.config import EngineConfig
from scalellm.executor.load import load_executor
executor = load_executor(EngineConfig(
    model_path=Path(sys.argv[1]), dtype="bfloat16", device="cpu", tensor_parallel_size=2,
    cpu_threads=2, kv_cache_memory_bytes=1 << 20,
))
print(*executor.rank_pids, flush=True)
sys.stdin.read()
"""


def test_ranks_end_with_the_process_that_has_rank_0(folder_of):
    command = [sys.executable, "-c", PARENT, str(folder_of("dense"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        rank = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        psutil.wait_procs([rank], timeout=60)
    assert ended(rank.pid)


def test_a_rank_that_cannot_load_says_why(folder_of, monkeypatch):
    orders = []

    def spoil(self, lines):
        orders.extend(lines)
        load_as_told(self, [line.replace(b'"seed": 0', b'"seed": "x"') for line in lines])

    load_as_told = Followers.load
    monkeypatch.setattr(Followers, "load", spoil)
    with pytest.raises(EngineError, match="rank 1 could not load: ConfigError"):
        load(folder_of("dense"), 2, quantization="int8")
    assert len(orders) == 1


def test_more_ranks_than_cores_are_told_to_be_slow(folder_of, monkeypatch):
    told = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    config = EngineConfig(
        model_path=folder_of("dense"), dtype="bfloat16", device="cpu", tensor_parallel_size=2,
        cpu_threads=2, kv_cache_memory_bytes=1 << 20,
    )  # fmt: skip
    load_executor(config, lambda phase, _seconds: told.append(phase)).close()
    assert "ranks: 2, 1 threads each; slow, as they have 1 cores to themselves" in told
