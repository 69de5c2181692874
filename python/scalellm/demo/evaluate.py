"""Measures a trained demo model with transformers: ``python -m scalellm.demo.evaluate DIR``.

Judges the weights as stored (bf16), decoded greedily, on every held-out sum in several phrasings,
on every fact of the tables, and on stories; then writes the model card, DIR/README.md.
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from scalellm.demo import arithmetic, exam, stories
from scalellm.demo.corpus import END_OF_TEXT, Message, documents, render
from scalellm.demo.exam import Case

SEED = 7
MIN_SUM_ACCURACY = 0.99
MIN_BARE_NUMBER_ACCURACY = 0.90  # without the sum before it, a result is harder


@dataclass(frozen=True, slots=True)
class Score:
    """How many cases of a kind were answered right, to the letter."""

    name: str
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    def __str__(self) -> str:
        return f"{self.name}: {self.right} of {self.total} ({self.share:.2%})"


@dataclass(frozen=True, slots=True)
class Report:
    num_parameters: int
    sum_scores: tuple[Score, ...]
    fact_scores: tuple[Score, ...]
    talk_scores: tuple[Score, ...]
    coherent_stories: Score
    answer_loss: float  # nats per token of assistants' turns, held-out conversations
    plain_loss: float  # nats per token of held-out plain text
    digit_margins: tuple[float, float, float]  # logits: least, 0.1 and 1 percent quantiles
    wrong: tuple[tuple[str, str], ...]  # some questions and their wrong answers
    samples: tuple[tuple[str, str], ...]  # some questions and their answers

    @property
    def good(self) -> bool:
        def least(score: Score) -> float:
            bare = "number only" in score.name
            return MIN_BARE_NUMBER_ACCURACY if bare else MIN_SUM_ACCURACY

        return all(score.share >= least(score) for score in self.sum_scores) and all(
            score.right == score.total for score in self.fact_scores
        )


class Reader(Protocol):
    """Something that reads texts and says what it expects to come next."""

    tokenizer: Any

    def logits(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [T] of a text and the logits [T, vocabulary], fp32, that follow each."""


class Judge:
    """A model folder loaded with transformers, in bf16."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def prompt(self, messages: Sequence[Message]) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.inference_mode()
    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        batch_size: int = 250,
    ) -> list[str]:
        """The model's answer to each conversation; greedy at temperature 0."""
        prompts = [self.prompt(messages) for messages in conversations]
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            inputs = self.tokenizer(
                [prompts[index] for index in indices],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            output = self.model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens)
            new_ids = output[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    @torch.inference_mode()
    def logits(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [T] of a text and the logits [T, vocabulary], fp32, that follow each."""
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids[0], self.model(ids).logits[0].float()


OPERATOR_NAMES = {"+": "additions", "-": "subtractions"}


def score(judge: Judge, name: str, cases: Sequence[Case], wrong: list[tuple[str, str]]) -> Score:
    """Asks the cases, adds the wrong answers to ``wrong``."""
    max_new_tokens = 16 + max(len(case.answer) for case in cases)  # a token is a byte or more
    answers = judge.answers([case.messages for case in cases], max_new_tokens)
    right = 0
    for case, answer in zip(cases, answers, strict=True):
        right += answer == case.answer
        if answer != case.answer:
            wrong.append((case.messages[-1].content, answer))
    result = Score(name, right, len(cases))
    print(result, flush=True)
    return result


def score_sums(judge: Judge, wrong: list[tuple[str, str]], stride: int) -> list[Score]:
    """Every ``stride``-th held-out sum, in every kind of phrasing."""
    rng = random.Random(SEED)
    scores = []
    for operator, name in OPERATOR_NAMES.items():
        sums = [s for s in arithmetic.all_sums("held_out") if s.operator == operator][::stride]
        for kind in exam.SUM_KINDS:
            cases = exam.sum_cases(sums, kind, rng)
            scores.append(score(judge, f"{name}, {kind}", cases, wrong))
    return scores


def score_facts(judge: Judge, wrong: list[tuple[str, str]]) -> list[Score]:
    return [score(judge, name, cases, wrong) for name, cases in exam.fact_cases().items()]


def score_talk(judge: Judge, wrong: list[tuple[str, str]], count: int) -> list[Score]:
    cases_by_name = exam.talk_cases(random.Random(SEED), count)
    return [score(judge, name, cases, wrong) for name, cases in cases_by_name.items()]


def score_stories(judge: Judge, count: int) -> tuple[Score, list[tuple[str, str]]]:
    torch.manual_seed(SEED)
    requests = [
        stories.PLAIN_REQUESTS[0],
        "Tell me a story about a fox named Max.",
        stories.LONG_REQUESTS[0],
    ]
    asked = [requests[0]] * count + requests[1:]
    told = judge.answers(
        [[Message("user", text)] for text in asked], max_new_tokens=600, temperature=0.7
    )
    coherent = Score("coherent stories", sum(map(exam.is_coherent, told[:count])), count)
    print(coherent, flush=True)
    return coherent, list(zip(requests, told[-3:], strict=True))


def held_out_losses(judge: Reader, count: int) -> tuple[float, float]:
    """Mean loss in nats on answers of held-out conversations, and on held-out plain text."""
    sums, tokens = [0.0, 0.0], [0, 0]
    for text in islice(documents(SEED, "held_out"), count):
        text = text.removesuffix(END_OF_TEXT)
        ids, logits = judge.logits(text)
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        is_chat = text.startswith("<|im_start|>")
        if is_chat:
            chosen = answer_mask(ids.tolist(), judge.tokenizer)[1:]
            losses = losses[torch.tensor(chosen)]
        kind = 0 if is_chat else 1
        sums[kind] += losses.sum().item()
        tokens[kind] += losses.numel()
    return sums[0] / tokens[0], sums[1] / tokens[1]


def answer_mask(ids: Sequence[int], tokenizer: Any) -> list[bool]:
    """True for the tokens of assistants' answers, their end-of-turn token included."""
    start, end, assistant = tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>", "assistant"]
    )
    mask, inside = [], False
    for index, token in enumerate(ids):
        mask.append(inside)
        if token == end:
            inside = False
        elif index >= 2 and ids[index - 2] == start and ids[index - 1] == assistant:
            inside = True
    return mask


def digit_margins(judge: Judge, stride: int) -> tuple[float, float, float]:
    """How far the right next token leads the runner-up, in logits, over the answers to sums.

    The least margin, the 0.1 percent and the 1 percent quantile; below 0 the answer is wrong.
    """
    margins = []
    for asked in list(arithmetic.all_sums("held_out"))[::stride]:
        (case,) = exam.sum_cases([asked], "plain", random.Random(SEED))
        text = render([*case.messages, Message("assistant", case.answer)])
        ids, logits = judge.logits(text)
        chosen = [
            i for i, inside in enumerate(answer_mask(ids.tolist(), judge.tokenizer)) if inside
        ]
        right = logits[[i - 1 for i in chosen], ids[chosen]]
        others = logits[[i - 1 for i in chosen]].scatter(1, ids[chosen][:, None], -math.inf)
        margins.append((right - others.amax(dim=1)).min())
    ordered = torch.stack(margins).sort().values
    quantiles = torch.quantile(ordered, torch.tensor([0.0, 0.001, 0.01])).tolist()
    return quantiles[0], quantiles[1], quantiles[2]


SAMPLE_QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is 47 + 35?",
    "Please subtract 81 from 27.",
    "What is the capital of France?",
    "What is the opposite of hot?",
    "Count from 7 to 12.",
    "Which day comes after Sunday?",
)


def evaluate(folder: Path, stride: int = 1) -> Report:
    """Every measure of the card; with ``stride`` n only on every n-th held-out sum."""
    judge = Judge(folder)
    wrong: list[tuple[str, str]] = []
    sum_scores = score_sums(judge, wrong, stride)
    fact_scores = score_facts(judge, wrong)
    talk_scores = score_talk(judge, wrong, count=200)
    coherent, told = score_stories(judge, count=100)
    answer_loss, plain_loss = held_out_losses(judge, count=400)
    answers = judge.answers([[Message("user", text)] for text in SAMPLE_QUESTIONS])
    return Report(
        num_parameters=judge.model.num_parameters(),
        sum_scores=tuple(sum_scores),
        fact_scores=tuple(fact_scores),
        talk_scores=tuple(talk_scores),
        coherent_stories=coherent,
        answer_loss=answer_loss,
        plain_loss=plain_loss,
        digit_margins=digit_margins(judge, stride),
        wrong=tuple(wrong),
        samples=(*zip(SAMPLE_QUESTIONS, answers, strict=True), *told),
    )


def main() -> None:
    from scalellm.demo.card import write_card

    parser = argparse.ArgumentParser(description="Measure a demo model and write its card.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stride", type=int, default=1, help="ask every n-th held-out sum only")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = evaluate(arguments.folder, arguments.stride)
    for question, answer in report.wrong[:20]:
        print(f"wrong: {question!r} {answer!r}")
    print(f"loss {report.answer_loss:.4f} {report.plain_loss:.4f} margins {report.digit_margins}")
    if arguments.stride == 1:
        write_card(report, arguments.folder)
    raise SystemExit(0 if report.good else 1)


if __name__ == "__main__":
    main()
