"""What the offline bench counts, and what the kernels' table says of a time."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from scalellm.bench.floor import Ceilings, Cost
from scalellm.bench.kernels import Line, cells, line_json, run_kernels, share_of_roofline
from scalellm.bench.kernels import Options as KernelOptions
from scalellm.bench.kernels_attention import AttentionCase, step_of
from scalellm.bench.kernels_linear import layout_of
from scalellm.bench.model_shape import ModelShape
from scalellm.bench.offline import Options, Repeat, prompts_of, run_offline
from scalellm.bench.timing import Timed, copies_of, median_s
from scalellm.cli.main import main
from scalellm.errors import ConfigError, EngineError
from scalellm.outputs import CompletionOutput, RequestOutput
from scalellm.sampling_params import SamplingParams

MACHINE = Ceilings(read_bytes_s=20e9, int8_ops_s=1e12, bf16_ops_s=0.5e12)
TINY = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 96)
OPTIONS = Options(input_len=5, output_len=3, num_prompts=4, repeats=2, vocab_size=50)


class Echo:
    """Answers as many tokens as asked for; `stop_at` is interrupted at that call."""

    max_model_len = 8

    def __init__(self, error: str | None = None, stop_at: int | None = None) -> None:
        self.calls: list[tuple[list[list[int]], SamplingParams]] = []
        self._error = error
        self._stop_at = stop_at

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: SamplingParams, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not use_tqdm
        self.calls.append(([list(prompt) for prompt in prompts], sampling_params))
        if len(self.calls) == self._stop_at:
            raise KeyboardInterrupt
        return [self._answer(list(prompt), sampling_params) for prompt in prompts]

    def _answer(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        tokens = (1,) * (params.max_tokens or 0)
        answer = CompletionOutput(0, "", tokens, "length", error=self._error)
        return RequestOutput(None, tuple(prompt), (answer,))


def test_every_repeat_has_prompts_of_its_own_and_the_warm_up_too() -> None:
    llm = Echo()
    said: list[Repeat] = []
    found = run_offline(llm, OPTIONS, said.append)
    prompts = [tuple(prompt) for call, _ in llm.calls for prompt in call]
    assert len(prompts) == len(set(prompts)) == 2 + 4 + 4
    assert all(len(prompt) == 5 and max(prompt) < 50 for prompt in prompts)
    assert prompts_of(OPTIONS, 0) == llm.calls[1][0]
    params = llm.calls[1][1]
    assert (params.max_tokens, params.ignore_eos, params.temperature) == (3, True, 0.0)
    assert [(one.requests, one.input_tokens, one.output_tokens) for one in said] == [
        (4, 20, 12)
    ] * 2
    assert found.repeats == tuple(said)


def test_rates_are_medians_with_their_spread() -> None:
    found = run_offline(Echo(), OPTIONS, lambda _: None)
    repeats = tuple(Repeat(elapsed, 4, 20, 12) for elapsed in (1.0, 2.0, 4.0))
    result = type(found)("", {}, OPTIONS, repeats, False)
    assert str(result.spread("output_tok_s")) == "6.0 (3.0 to 12.0)"
    assert result.spread("total_tok_s").median == 16.0
    document = result.to_json({"quantization": "int8"})
    assert document["output_tok_s"] == {"median": 6.0, "lowest": 3.0, "highest": 12.0}
    assert [row["requests_s"] for row in document["rows"]] == [4.0, 2.0, 1.0]


def test_what_was_measured_before_ctrl_c_is_kept() -> None:
    found = run_offline(Echo(stop_at=3), OPTIONS, lambda _: None)
    assert (len(found.repeats), found.interrupted) == (1, True)
    nothing = run_offline(Echo(stop_at=1), OPTIONS, lambda _: None)
    assert nothing.to_json({})["rows"] == []


def test_a_failed_answer_is_no_throughput() -> None:
    with pytest.raises(EngineError, match=r"4 of 4 requests failed, e\.g\. not finite"):
        # The warm-up is not looked at: it is the same failure.
        run_offline(Echo(error="not finite"), OPTIONS, lambda _: None)


def test_lengths_beyond_the_model_are_refused_before_anything_runs() -> None:
    llm = Echo()
    with pytest.raises(ConfigError, match="allowed: 8 tokens together"):
        run_offline(llm, Options(6, 3, 1, 1, 50), lambda _: None)
    assert llm.calls == []


def test_the_roofline_is_the_ceiling_that_binds() -> None:
    read = Line(Timed("int8 qkv", "1 x 2", 2e-3, Cost(20e6, 1e6, "int8")), MACHINE)
    assert share_of_roofline(read) == pytest.approx(0.5)
    assert cells(read)[2:] == ["2.000", "10.0 GB/s", "read", "50%"]
    product = Line(Timed("bf16 qkv", "512 x 2", 2e-3, Cost(1e6, 0.9e9, "bf16")), MACHINE)
    assert cells(product)[3:] == ["450 GOP/s", "bf16", "90%"]
    found = line_json(product)
    assert (found["bound_by"], found["percent"]) == ("bf16", pytest.approx(90.0))
    norm = Line(Timed("rms_norm", "1 x 2", 1e-6, None), MACHINE)
    assert cells(norm)[3:] == ["-", "-", "-"]


def test_matrices_are_laid_out_as_the_loader_does() -> None:
    by_name = {matrix.name: matrix for matrix in TINY.matrices}
    assert layout_of(by_name["gate_up"], "int8", False).gated
    assert layout_of(by_name["down"], "int8", False).groups == 8
    assert layout_of(by_name["qkv"], "int4", False).groups == 1
    assert layout_of(TINY.output, "bf16", True).format == "bf16"


def test_a_step_of_decodes_reads_every_block_once() -> None:
    step = step_of(AttentionCase(sequences=3, tokens=40, new=1))
    assert sorted(step.tables.tolist()) == list(range(9))
    assert step.spans.tolist() == [[0, 39, 1, 0], [1, 39, 1, 3], [2, 39, 1, 6]]
    assert AttentionCase(2, 40, 1).pairs == 80
    assert AttentionCase(1, 4, 4).pairs == 10
    assert AttentionCase(1, 6, 2).pairs == 11


def test_times_are_medians_after_a_call_to_warm_up() -> None:
    calls: list[int] = []
    assert median_s(lambda: calls.append(1), 0.0) >= 0.0
    assert len(calls) == 4
    assert copies_of(1 << 40) == 1
    assert copies_of(1 << 20) == 160


def test_every_op_of_a_tiny_model_is_timed() -> None:
    options = KernelOptions(TINY, ("linear",), ("bf16", "int8", "int4"), (1, 3), seconds=0.0)
    found = run_kernels(options, lambda _: None)
    assert len(found.lines) == 3 * 5 * 2
    assert not found.interrupted
    with pytest.raises(ConfigError, match="ops: got gemm"):
        run_kernels(KernelOptions(TINY, ("gemm",)), lambda _: None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("kernels", "--rows", "0"), "--rows: got '0'"),
        (("kernels", "--formats", "fp8"), "--formats: got fp8, allowed: bf16, int8, int4"),
        (("kernels", "--seconds", "nan"), "--seconds: got nan"),
        (("kernels", "--cpu-threads", "5000"), "--cpu-threads: got 5000"),
        (("offline", "--num-prompts", "0"), "--num-prompts: got 0"),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert said in capsys.readouterr().err


def test_offline_measures_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "offline.json"
    lengths = ("--input-len", "8", "--output-len", "4", "--num-prompts", "3", "--repeats", "2")
    memory = ("--kv-cache-memory", "16MiB", "--cpu-threads", "1")
    assert main(["bench", "offline", *lengths, *memory, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [row["output_tokens"] for row in document["rows"]] == [12, 12]
    assert (document["workload"]["input_len"], document["settings"]["model"]) == (8, "model")
    assert "output tok/s" in capsys.readouterr().out
