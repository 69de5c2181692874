"""The Python API on the demo model, against transformers."""

import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from scalellm import LLM, RequestOutput, SamplingParams
from scalellm.demo import model_folder
from scalellm.errors import ConfigError, EngineError, ModelNotFoundError, RequestError

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def make() -> LLM:
    return LLM(
        "demo", dtype="float32", cpu_threads=1, kv_cache_memory_bytes=32 << 20, max_model_len=256
    )


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make() as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    folder = model_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return transformers.AutoTokenizer.from_pretrained(folder), model


def expected_ids(reference: tuple[Any, Any], ids: list[int], count: int) -> list[int]:
    _, model = reference
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return [int(token) for token in whole[0, len(ids) :]]


def blocks_in_use(llm: LLM) -> int:
    used: int = llm._engine.listener.load[3]
    return used


def test_greedy_answers_are_those_of_transformers(llm: LLM, reference: tuple[Any, Any]) -> None:
    tokenizer, _ = reference
    texts = ["Once upon a time", "The capital of France", "What is", "Mia was", "A small"]
    outputs = llm.generate(texts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == texts
    for text, output in zip(texts, outputs, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert list(output.prompt_token_ids) == ids
        [answer] = output.outputs
        assert list(answer.token_ids) == expected_ids(reference, ids, 24)
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_chat_uses_the_models_template_and_ends_by_itself(
    llm: LLM, reference: tuple[Any, Any]
) -> None:
    tokenizer, _ = reference
    [output] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    rendered = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert list(output.prompt_token_ids) == rendered
    assert list(output.outputs[0].token_ids) == expected_ids(reference, rendered, 24)
    assert output.outputs[0].finish_reason == "stop"
    assert "17 + 25" in output.outputs[0].text and "<|" not in output.outputs[0].text


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    other = [{"role": "user", "content": "What is 3 + 4?"}]
    both = llm.chat([QUESTION, other], GREEDY, use_tqdm=False)
    alone = [llm.chat(one, GREEDY, use_tqdm=False)[0] for one in (QUESTION, other)]
    assert [o.outputs[0].text for o in both] == [o.outputs[0].text for o in alone]


def test_streamed_pieces_are_the_whole_answer(llm: LLM) -> None:
    [whole] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    pieces = list(llm.stream(QUESTION, GREEDY))
    assert len(pieces) > 2 and "".join(pieces) == whole.outputs[0].text
    assert "".join(llm.stream("Once upon", GREEDY)) == (
        llm.generate("Once upon", GREEDY, use_tqdm=False)[0].outputs[0].text
    )


def test_leaving_a_stream_cancels_the_request(llm: LLM) -> None:
    pieces = llm.stream("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
    next(pieces)
    pieces.close()
    llm.generate("Go", GREEDY, use_tqdm=False)
    assert blocks_in_use(llm) == 0


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    [whole] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[4:8]
    before = text[: text.index(stop)]
    for params, expected in [
        (SamplingParams(temperature=0, max_tokens=24, stop=["never", stop]), before),
        (
            SamplingParams(
                temperature=0, max_tokens=24, stop=stop, include_stop_str_in_output=True
            ),
            before + stop,
        ),
    ]:
        [output] = llm.chat(QUESTION, params, use_tqdm=False)
        [answer] = output.outputs
        assert (answer.text, answer.finish_reason, answer.stop_reason) == (expected, "stop", stop)
        assert "".join(llm.stream(QUESTION, params)) == expected


def test_stop_strings_do_not_stop_before_min_tokens(llm: LLM) -> None:
    story = "Once upon a time"
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    text = llm.generate(story, params, use_tqdm=False)[0].outputs[0].text
    stop = " "
    last_stops = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, stop=stop, min_tokens=24
    )
    [output] = llm.generate(story, last_stops, use_tqdm=False)
    assert stop in text and output.outputs[0].text == text


def test_a_stop_token_is_named(llm: LLM) -> None:
    [whole] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    token = whole.outputs[0].token_ids[3]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token])
    [output] = llm.chat(QUESTION, params, use_tqdm=False)
    assert output.outputs[0].stop_reason == token
    assert output.outputs[0].finish_reason == "stop"


def test_a_seed_repeats_and_choices_differ(llm: LLM) -> None:
    params = SamplingParams(seed=5, n=3, max_tokens=20, temperature=1.5)

    def texts(outputs: list[RequestOutput]) -> list[str]:
        return [answer.text for output in outputs for answer in output.outputs]

    first = llm.generate(["Once upon a time"], params, use_tqdm=False)
    crowd = llm.generate(["Lucy", "Once upon a time", "Sam"], params, use_tqdm=False)
    assert texts(first) == texts(crowd[1:2]) and len(set(texts(first))) == 3
    assert [answer.index for answer in first[0].outputs] == [0, 1, 2]


def test_what_else_is_asked_for_changes_no_token() -> None:
    """Of what is drawn from the largest logits alone, unless all are needed for something."""
    few = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=5, max_tokens=40)
    prompts = ["What is 17 + 25?", "Once upon a time"]

    def ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
        return [output.outputs[0].token_ids for output in outputs]

    with LLM("demo", cpu_threads=1, kv_cache_memory_bytes=32 << 20, max_model_len=256) as llm:
        alone = ids(llm.generate(prompts, few, use_tqdm=False))
        scored = ids(llm.generate(prompts, replace(few, logprobs=2), use_tqdm=False))
        params = [few, few, SamplingParams(seed=1, max_tokens=60)]
        beside = ids(llm.generate([*prompts, "And"], params, use_tqdm=False))
    assert scored == alone == beside[:2]
    assert alone[0] != alone[1]


def test_logprobs_are_of_the_models_distribution(llm: LLM, reference: tuple[Any, Any]) -> None:
    _, model = reference
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=4, logprobs=3, prompt_logprobs=1)
    [output] = llm.generate("Once upon a time", params, use_tqdm=False)
    [answer] = output.outputs
    ids = [*output.prompt_token_ids, *answer.token_ids]
    with torch.inference_mode():
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert answer.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate([*output.prompt_logprobs, *answer.logprobs]):
        if entry is not None:
            for token, found in entry.items():
                assert found.logprob == pytest.approx(float(table[position - 1, token]), abs=1e-3)
            assert ids[position] in entry
    assert all(3 <= len(entry) <= 4 for entry in answer.logprobs)


def test_a_repeated_prompt_comes_from_the_prefix_cache(llm: LLM) -> None:
    prompt = list(range(20, 90))
    first, again = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert again.cached_tokens == 64 and again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_crowd_in_a_small_cache_is_preempted_and_answers_as_alone(llm: LLM) -> None:
    names = ["Lucy", "Tom", "Mia", "Sam", "Leo", "Max", "Felix", "Anna"]
    texts = [f"{name} had {count} apples and" for name in names for count in (2, 3)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    alone = [llm.generate(text, params, use_tqdm=False)[0].outputs[0] for text in texts]
    with LLM(
        "demo", dtype="float32", cpu_threads=1, kv_cache_memory_bytes=1 << 20, max_model_len=128
    ) as small:
        crowd = small.generate(texts, params, use_tqdm=False)
        preemptions = small._engine.listener.load[8]
        assert blocks_in_use(small) == 0
    assert preemptions > 0
    assert [o.outputs[0].token_ids for o in crowd] == [answer.token_ids for answer in alone]


def test_threads_share_one_engine(llm: LLM) -> None:
    wanted = llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0].text
    found: list[str] = []

    def ask() -> None:
        found.append(llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0].text)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 6


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 256, "got 256 tokens; allowed is 1 to 255"),
        ([], None),
        ("", "got 0 tokens"),
        ([10**9], "got token id 1000000000; allowed is 0 to"),
        ([[1.5]], "got \\[1.5\\]; allowed is a text"),
        ({"text": "x"}, "allowed is a text, a list of token ids"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(
    llm: LLM, prompt: Any, message: str | None
) -> None:
    if message is None:
        assert llm.generate(prompt, GREEDY, use_tqdm=False) == []
        return
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, GREEDY, use_tqdm=False)


def test_wrong_conversations_and_settings_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat([{"role": "user", "content": object()}], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="sampling_params: got 1 for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(RequestError, match="n: got 2; allowed is 1 when streaming"):
        llm.stream("a", SamplingParams(n=2))
    with pytest.raises(RequestError, match="logit_bias: got token id"):
        llm.generate("a", SamplingParams(logit_bias={10**6: 1.0}), use_tqdm=False)
    with pytest.raises(ConfigError, match="unknown setting 'max_num_seq'; did you mean 'max_num_"):
        LLM("demo", max_num_seq=4)
    with pytest.raises(ModelNotFoundError):
        LLM("./no/such/folder")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("n", 0, "a whole number from 1 to 128"),
        ("temperature", -1, "a number from 0 to 100"),
        ("temperature", math.nan, "a number from 0 to 100"),
        ("temperature", 101, "a number from 0 to 100"),
        ("temperature", "hot", "a number from 0 to 100"),
        ("top_p", 0, "a number above 0, at most 1"),
        ("top_k", -2, "a whole number at least -1"),
        ("min_p", 1.1, "a number from 0 to 1"),
        ("repetition_penalty", 0.001, "a number from 0.01 to 100"),
        ("presence_penalty", 3, "a number from -2 to 2"),
        ("frequency_penalty", math.inf, "a number from -2 to 2"),
        ("logit_bias", {3: 101}, "a mapping from token id to a number from -100 to 100"),
        ("logit_bias", {"3": 1}, "a mapping from token id to a number from -100 to 100"),
        ("seed", 2**64, "a whole number from 0 to"),
        ("max_tokens", 0, "a whole number at least 1, or None"),
        ("max_tokens", True, "a whole number at least 1, or None"),
        ("min_tokens", 17, "at most max_tokens, 16"),
        ("stop", ["a", ""], "a text or a list of texts, none of them empty"),
        ("stop_token_ids", [-1], "a list of token ids"),
        ("ignore_eos", 1, "True or False"),
        ("logprobs", 21, "a whole number from 0 to 20, or None"),
        ("prompt_logprobs", 1.0, "a whole number from 0 to 20, or None"),
    ],
)
def test_wrong_sampling_params_name_field_value_and_what_is_allowed(
    field: str, value: Any, allowed: str
) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value).startswith(f"{field}: got {value!r}; allowed is {allowed}")


def test_ctrl_c_cancels_what_runs_and_the_engine_serves_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LLM, "_take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Once"] * 4, SamplingParams(max_tokens=200), use_tqdm=False)
    llm.generate("Go", GREEDY, use_tqdm=False)
    assert blocks_in_use(llm) == 0


def test_a_closed_engine_says_so_and_closes_twice() -> None:
    llm = make()
    pieces = llm.stream("Once upon", SamplingParams(max_tokens=200, ignore_eos=True))
    next(pieces)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        list(llm.generate("a", GREEDY, use_tqdm=False))


def test_importing_the_api_imports_no_torch_and_a_script_ends_cleanly() -> None:
    script = (
        "import sys\n"
        "from scalellm import LLM, SamplingParams\n"
        "SamplingParams(max_tokens=3)\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "llm = LLM('demo', cpu_threads=1, kv_cache_memory_bytes=1 << 22, max_model_len=128)\n"
        "stream = llm.stream('Once', SamplingParams(max_tokens=100, ignore_eos=True))\n"
        "print(bool(next(stream)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
