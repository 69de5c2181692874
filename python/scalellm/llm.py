"""The engine inside a Python program: no server, no network.

    llm = LLM("demo")
    [answer] = llm.chat([{"role": "user", "content": "What is 17 + 25?"}])
    print(answer.outputs[0].text)

The same scheduler, cache, sampler and loop as behind `scalellm serve`; text is the same Rust code
as in the gateway. Importing this module imports no torch; making an `LLM` does.
"""

import json
import queue
import secrets
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from scalellm.config import EngineConfig
from scalellm.errors import ConfigError, EngineError, RequestError
from scalellm.generation import Generation, Prompt, bias_pairs
from scalellm.outputs import RequestOutput
from scalellm.sampling_params import SamplingParams
from scalellm.settings import suggestion

if TYPE_CHECKING:
    from scalellm._core import Tokenizer
    from scalellm.engine.local import LocalEngine, LocalSubmission, Outbox

TextOrIds = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A loaded model. Thread-safe; close it, or use it in a `with` statement."""

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        """`model`: a folder, a hub id, or `demo`; `settings`: those of `scalellm engine`.

        Raises ConfigError for unknown or wrong settings, ModelError if it cannot be loaded."""
        known = EngineConfig.__dataclass_fields__.keys() - {"model", "model_path"}
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}{suggestion(name, known)}")
        config = EngineConfig(model=model, **settings)
        folder = _folder(config)
        self._tokenizer = _tokenizer(folder)
        self._engine, self._limit, self._vocab_size = _start(replace(config, model_path=folder))
        self._closer = weakref.finalize(self, self._engine.close)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._limit

    def generate(
        self,
        prompts: TextOrIds | Sequence[TextOrIds],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt: a text, token ids, or {"prompt_token_ids": ids}.

        Results are in the order of the prompts. All prompts are checked before any runs: raises
        RequestError, EngineError. A request that fails alone has finish_reason "error" and its
        `error`. Ctrl-C cancels what still runs."""
        one: bool = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and _is_ids(prompts))
        given: Any = [prompts] if one else prompts
        return self._run_all([self._prompt(item) for item in given], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, written with the model's chat template."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        rendered = [
            self._render(turns, add_generation_prompt, chat_template, chat_template_kwargs)
            for turns in conversations
        ]
        return self._run_all(rendered, sampling_params, use_tqdm)

    def stream(
        self,
        prompt: TextOrIds | Sequence[Message],
        sampling_params: SamplingParams | None = None,
    ) -> Generator[str, None, None]:
        """The text of one answer, piece by piece. Leaving the iterator cancels the request."""
        params = sampling_params if sampling_params is not None else SamplingParams()
        if params.n != 1:
            raise RequestError(f"n: got {params.n}; allowed is 1 when streaming")
        if not isinstance(prompt, str | Mapping) and prompt and isinstance(prompt[0], Mapping):
            ready = self._render(prompt, True, None, None)
        else:
            ready = self._prompt(prompt)
        self._check_length(ready)
        return self._pieces(ready, params)

    def close(self) -> None:
        """Cancel what runs and give the memory back. Closing twice is fine."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------ prompts

    def _prompt(self, given: Any) -> Prompt:
        if isinstance(given, str):
            return Prompt(given, tuple(self._text_tokenizer().encode(given)))
        ids: Any = given.get("prompt_token_ids") if isinstance(given, Mapping) else given
        if not isinstance(ids, Sequence) or not _is_ids(ids):
            raise RequestError(
                f"prompts: got {given!r:.80}; allowed is a text, a list of token ids, "
                'or {"prompt_token_ids": ids}'
            )
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(
                    f"prompts: got token id {token_id}; allowed is 0 to {self._vocab_size - 1}"
                )
        return Prompt(None, tuple(ids))

    def _render(
        self,
        messages: Any,
        add_generation_prompt: bool,
        template: str | None,
        kwargs: Mapping[str, Any] | None,
    ) -> Prompt:
        tokenizer = self._text_tokenizer()
        try:
            text = tokenizer.apply_chat_template(
                json.dumps(messages),
                add_generation_prompt,
                template,
                None if kwargs is None else json.dumps(dict(kwargs)),
            )
        except (TypeError, ValueError) as error:
            raise RequestError(f"messages: {error}") from None
        return Prompt(text, tuple(tokenizer.encode(text, add_special_tokens=False)))

    def _text_tokenizer(self) -> "Tokenizer":
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer.json; give token ids instead of text")
        return self._tokenizer

    def _check_length(self, prompt: Prompt) -> None:
        if not 1 <= len(prompt.token_ids) < self._limit:
            raise RequestError(
                f"prompts: got {len(prompt.token_ids)} tokens; allowed is 1 to {self._limit - 1}, "
                f"because prompt and output together may have {self._limit}"
            )

    # ------------------------------------------------------------ running

    def _run_all(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            params = [SamplingParams()] * len(prompts)
        elif isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(prompts)
        else:
            params = list(sampling_params)
            if len(params) != len(prompts):
                raise RequestError(
                    f"sampling_params: got {len(params)} for {len(prompts)} prompts; allowed is "
                    "one for all, or one for each"
                )
        for prompt in prompts:
            self._check_length(prompt)
        from tqdm import tqdm

        outbox: Outbox = queue.SimpleQueue()
        generations: list[Generation] = []
        by_key: dict[int, Generation] = {}
        left = len(prompts)
        with tqdm(total=len(prompts), disable=not use_tqdm, unit="prompt") as bar:
            try:
                for prompt, wanted in zip(prompts, params, strict=True):
                    generation, submissions = self._begin(prompt, wanted)
                    generations.append(generation)
                    by_key.update(dict.fromkeys(generation.choices, generation))
                    self._engine.listener.submit(submissions, outbox)
                while left > 0:
                    if self._take(outbox, by_key):
                        left -= 1
                        bar.update()
            finally:
                self._engine.listener.cancel(list(by_key))
        return [generation.result() for generation in generations]

    def _take(self, outbox: "Outbox", by_key: dict[int, Generation]) -> bool:
        """Wait for one output; whether it finished its generation."""
        output = outbox.get()
        if output is None:
            raise self._engine.failure()
        key = output[0]
        generation = by_key[key]
        was_finished = generation.finished
        generation.take(output)
        if generation.choices[key].finished:
            self._engine.listener.cancel([key])
        return generation.finished and not was_finished

    def _pieces(self, prompt: Prompt, params: SamplingParams) -> Generator[str, None, None]:
        outbox: Outbox = queue.SimpleQueue()
        generation, submissions = self._begin(prompt, params)
        self._engine.listener.submit(submissions, outbox)
        try:
            while not generation.finished:
                output = outbox.get()
                if output is None:
                    raise self._engine.failure()
                if piece := generation.take(output):
                    yield piece
            error = generation.result().outputs[0].error
            if error is not None:
                raise EngineError(error)
        finally:
            self._engine.listener.cancel(list(generation.choices))

    def _begin(
        self, prompt: Prompt, params: SamplingParams
    ) -> tuple[Generation, "list[LocalSubmission]"]:
        from scalellm.engine.local import LocalSubmission

        room = self._limit - len(prompt.token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        keys = [self._engine.listener.next_key() for _ in range(params.n)]
        submissions = [
            LocalSubmission(
                key=key,
                prompt_ids=list(prompt.token_ids),
                max_tokens=max_tokens,
                seed=seed,
                choice=choice,
                min_tokens=min(params.min_tokens, max_tokens),
                stop_token_ids=[i for i in params.stop_token_ids if i < self._vocab_size],
                ignore_eos=params.ignore_eos,
                priority=params.priority,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=max(0, params.top_k),
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                logit_bias=self._bias(params),
                logprobs=params.logprobs,
                prompt_logprobs=params.prompt_logprobs,
            )
            for choice, key in enumerate(keys)
        ]
        return Generation(prompt, params, keys, self._tokenizer), submissions

    def _bias(self, params: SamplingParams) -> list[tuple[int, float]]:
        pairs = bias_pairs(params.logit_bias)
        for token_id, _ in pairs:
            if token_id >= self._vocab_size:
                raise RequestError(
                    f"logit_bias: got token id {token_id}; allowed is 0 to {self._vocab_size - 1}"
                )
        return pairs


def _is_ids(given: Sequence[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in given)


def _folder(config: EngineConfig) -> Path:
    if config.model == "demo":
        return Path(str(resources.files("scalellm.demo") / "model"))
    from scalellm.loader.hub import resolve_model

    return resolve_model(config.model, config.revision, weights=config.load_format != "dummy")


def _tokenizer(folder: Path) -> "Tokenizer | None":
    """None where the folder has none, as with dummy weights: then only token ids go in and out."""
    if not (folder / "tokenizer.json").is_file():
        return None
    from scalellm._core import Tokenizer

    return Tokenizer(str(folder))


def _start(config: EngineConfig) -> "tuple[LocalEngine, int, int]":
    """Load the model and start its loop: the engine, its longest request, its vocabulary's size."""
    from scalellm.engine.local import LocalEngine, LocalListener
    from scalellm.engine.loop import EngineLoop
    from scalellm.executor.load import load_executor

    config = replace(config, compute_nice=0)
    executor = load_executor(config)
    listener = LocalListener()
    loop = EngineLoop(executor, listener, config)
    return (
        LocalEngine(loop, listener, executor.close),
        loop.scheduler.max_model_len,
        executor.vocab_size,
    )
