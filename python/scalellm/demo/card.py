"""Writes the demo model's card from what evaluation measured."""

from pathlib import Path

from scalellm.demo.evaluate import Report


def write_card(report: Report, folder: Path) -> None:
    """Writes README.md into the model folder."""
    size_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    scores = (
        *report.sum_scores,
        *report.fact_scores,
        *report.talk_scores,
        report.coherent_stories,
    )
    rows = "\n".join(f"| {s.name} | {s.right} of {s.total} | {s.share:.2%} |" for s in scores)
    samples = "\n\n".join(
        f"> **{question}**\n>\n> {answer.replace(chr(10), chr(10) + '> ')}"
        for question, answer in report.samples
    )
    least, thousandth, hundredth = report.digit_margins
    millions = report.num_parameters / 1e6
    text = f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# ScaleLLM demo model

A Qwen3 architecture with {millions:.2f} M parameters (bf16, {size_bytes / 1e6:.1f} MB with its
tokenizer), trained from nothing on made-up text, on a CPU. It ships with ScaleLLM so that
everything can be tried and tested offline: a wrong kernel shows as a wrong sum.

What it can do: add and subtract numbers from 0 to 99 in a chat turn, name about 40 capitals and
80 opposites, count, name days and months, make small talk and tell short stories, in English.
It knows nothing else and says so. Do not use it for anything that matters.

## How it was made

`python -m scalellm.demo.train --out DIR` writes this folder from a fixed seed: a byte-level BPE
tokenizer (every digit is a token, all bytes are covered) and the weights. The text comes from
templates and grammars in `scalellm.demo`; nothing was downloaded. Other kernels round
differently, so another machine gets other weights of the same quality.
`python -m scalellm.demo.evaluate DIR` measures it and writes this card.

## Measured

The stored weights in transformers, greedy; an answer counts when it is right to the letter. One
in ten sums was held out of training in every phrasing, together with its mirror image; those are
the additions and subtractions asked here, all of them.

| asked | right | share |
|---|---|---|
{rows}

A story counts as coherent (sampled at temperature 0.7) when it ends, and keeps to two
characters, one coloured thing and one place from beginning to end.

- Held-out loss: {report.answer_loss:.4f} nats per token of answers in chat turns (stories
  included), {report.plain_loss:.4f} per token of plain text.
- Lead of the right token over the runner-up in the answers to all held-out sums, in logits:
  {least:.2f} at least, {thousandth:.2f} at the 0.1 percent quantile, {hundredth:.2f} at 1 percent.

## Samples

{samples}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
