"""A model without arithmetic under the scheduler: it reads what the KV blocks hold."""

import random
import zlib

from scalellm.engine.kv_cache import KVCache
from scalellm.engine.request import Request
from scalellm.engine.scheduler import Scheduler
from scalellm.engine.step import Limits, Step

EOS = 0
LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, step_budget_ms=1e9)


def next_token(context: list[int], remembers: int = 1000) -> int:
    """A model: a function of what it remembers, EOS now and then; of two ids it repeats itself."""
    return zlib.crc32(repr(context[-remembers:]).encode()) % 23


class Machine:
    """Runs a scheduler's steps: writes ids into blocks, samples from what the blocks hold."""

    def __init__(
        self,
        limits: Limits = LIMITS,
        blocks: int = 32,
        block_size: int = 4,
        remembers: int = 1000,
        **kv: bool,
    ):
        self.remembers = remembers
        self.further: dict[int, list[int]] = {}
        self.kv = KVCache(blocks, block_size, **kv)
        self.scheduler = Scheduler(limits, self.kv)
        self.memory = [[-1] * block_size for _ in range(blocks)]
        self.steps: list[Step] = []
        self.now_us = 1000
        self.done: dict[int, Request] = {}
        self.errors: dict[int, str | None] = {}
        self.emitted: dict[int, list[int]] = {}

    def compute(self, step: Step) -> list[int | None]:
        size = self.kv.block_size
        written = [
            block
            for span in step.spans
            for block in span.block_table[
                span.start // size : -(-(span.start + len(span.token_ids)) // size)
            ]
        ]
        assert len(set(written)) == len(written), "two spans write one block"
        sampled: list[int | None] = []
        self.further = {}
        for key, span in zip(step.keys, step.spans, strict=True):
            for position, token in enumerate(span.token_ids, span.start):
                self.memory[span.block_table[position // size]][position % size] = token
            end = span.start + len(span.token_ids)
            held = [self.memory[span.block_table[i // size]][i % size] for i in range(end)]
            request = self.scheduler.requests[key]
            known = end - span.num_drafts
            assert held[:known] == request.token_ids[:known], "another sequence's tokens"
            assert known == request.num_tokens or not span.num_drafts, "drafts inside a sequence"
            if known < request.num_tokens:
                sampled.append(None)
                continue
            assert span.num_logits >= 1 + span.num_drafts
            ids = [
                next_token(held[: known + i], self.remembers) for i in range(1 + span.num_drafts)
            ]
            right = 0
            while right < span.num_drafts and ids[right] == held[known + right]:
                right += 1
            sampled.append(ids[0])
            self.further[key] = ids[1 : 1 + right]
        return sampled

    def step(self) -> Step:
        self.now_us += 10
        step = self.scheduler.schedule(self.now_us)
        self.scheduler.check_integrity()
        assert step.shape.tokens <= self.scheduler.limits.max_num_batched_tokens
        assert len(step.keys) <= self.scheduler.limits.max_num_seqs
        assert step.keys or not self.scheduler.requests, "requests, and no work for any of them"
        if step.keys:
            sampled = self.compute(step)
            self.scheduler.update(step, sampled, self.now_us, None, self.further)
        self.collect()
        self.steps.append(step)
        return step

    def collect(self) -> None:
        self.scheduler.check_integrity()
        for output in self.scheduler.take_outputs():
            key = output.request.key
            assert key not in self.done, "output after the end"
            self.emitted.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.done[key] = output.request
                self.errors[key] = output.error

    def run(self, limit: int = 5000) -> None:
        while self.scheduler.requests:
            assert len(self.steps) < limit, "requests do not finish"
            self.step()
        self.collect()

    def add(self, key: int, prompt: list[int], max_tokens: int, **more: object) -> Request:
        request = Request(
            key=key,
            prompt_ids=prompt,
            max_tokens=max_tokens,
            **{"eos_token_ids": frozenset({EOS}), **more},  # type-checked by the dataclass's users
        )
        self.scheduler.add(request, self.now_us)
        return request


def alone(
    prompt: list[int], max_tokens: int, max_model_len: int, remembers: int = 1000
) -> list[int]:
    """What one request gives without scheduler or cache."""
    context = list(prompt)
    while len(context) - len(prompt) < max_tokens and len(context) < max_model_len:
        context.append(next_token(context, remembers))
        if context[-1] == EOS:
            break
    return context[len(prompt) :]


def prompt_of(rng: random.Random, families: list[list[int]], longest: int) -> list[int]:
    head = rng.choice(families)
    tail = [rng.randrange(1, 23) for _ in range(rng.randrange(1, 12))]
    return ([*head[: rng.randrange(len(head) + 1)], *tail])[:longest]
