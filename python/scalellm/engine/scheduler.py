"""Decides what each step computes. Pure: no tensors, no clock, no threads.

    add() -> WaitingQueue -> schedule(now) -> Step -> (executor, sampler) -> update(step, ids, now)
                  ^               |                                              |
                  `---- preempt --'                            take_outputs() <--'

One step, in this order:
 1. Every running sequence that lacks one token gets it (decode), so streams never wait for prompts;
    with speculation (speculation.py) also guesses at the ones behind it.
 2. Running prompts go on, in chunks that keep the step within its tokens and its predicted time.
 3. Waiting requests are admitted while blocks, tokens and time are left; those that are more
    important than a running prompt, or go on in the middle of an answer, come before its chunk.
The step's first chunk is never below `FLOOR_CHUNK_TOKENS`, so prompts always advance; beside
streams, not below what takes the time of as many without context: the more context, the fewer.

When blocks run out. A running sequence takes blocks one at a time as it grows; nothing is reserved.
When none is left, the last running request by `Request.order` gives up its blocks and is
recomputed later. After `max_preemptions` a request is protected: it is admitted again only when its
worst case fits, those blocks are reserved, and it is never chosen again. No deadlock follows:
 - a protected running request never lacks a block, so it runs to its end;
 - of the others, the first in order never waits: it may take the blocks of all behind it, and if
   only protected ones hold blocks, it is itself preempted (at most `max_preemptions` times);
 - admission is in order and nobody passes a request that does not fit, so the blocks that running
   requests give back reach it; any admissible request fits into the empty cache.
Each preemption doubles the free blocks that the next admission asks for, so protection stays rare.
With `max_preemptions` 0 every request is protected from the start: worst cases are reserved.
"""

from bisect import insort
from collections.abc import Mapping, Sequence

from scalellm.engine.kv_cache import KVCache
from scalellm.engine.request import FinishReason, Request, Status
from scalellm.engine.request_blocks import RequestBlocks
from scalellm.engine.speculation import PromptLookup, row_share
from scalellm.engine.step import Limits, Output, Plan, Step
from scalellm.engine.step_time import StepShape, StepTime
from scalellm.engine.waiting import Deadlines, WaitingQueue

FLOOR_CHUNK_TOKENS = 32
_LEAST_CHUNK_TOKENS = 4  # however much context: a prompt is not to wait for ever
# Of the whole step's budget, for an answer that another replica began: its client's pause ends when
# it is computed, and lasts as many steps as it is cut into.
_RESUMED_SHARE = 0.5
_MAX_DEFERRED = 32  # requests that one step looks at and leaves for later


class Scheduler:
    """Owns the requests and the KV cache's blocks."""

    def __init__(self, limits: Limits, kv: KVCache, step_time: StepTime | None = None) -> None:
        self.limits = limits
        self.kv = kv
        self.step_time = step_time if step_time is not None else StepTime()
        self.max_model_len = min(limits.max_model_len, kv.num_blocks * kv.block_size)
        self.requests: dict[int, Request] = {}
        self.admits = True  # what waits; not while requests are handed over
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self._waiting = WaitingQueue()
        self._running: list[Request] = []  # by Request.order
        self._deadlines = Deadlines()
        self._blocks = RequestBlocks(kv, limits, self.max_model_len)
        self._in_flight: frozenset[int] = frozenset()
        self._outputs: list[Output] = []
        self._lookups: dict[int, PromptLookup] = {}  # of streams, by key, with speculation
        self.num_drafts = 0
        self.num_right_drafts = 0
        self._row_share = 0.0  # a row's time in those of a token, in the last step

    # ------------------------------------------------------------ requests in and out

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def backlog_tokens(self) -> int:
        """Tokens accepted and neither computed nor cached, those that running streams sample next
        not among them."""
        left = (request.num_tokens - request.num_computed_tokens for request in self._running)
        return self._waiting.num_tokens + sum(tokens for tokens in left if tokens > 1)

    def add(self, request: Request, now_us: int) -> None:
        """Queue a request; one that can never run ends at once with an error.

        Raises ValueError if the key is in use."""
        if request.key in self.requests:
            raise ValueError(f"request key {request.key} is in use")
        self.requests[request.key] = request
        request.queued_us = now_us
        refusal = self._refusal(request)
        if refusal is not None:
            self._finish(request, "error", now_us, error=refusal)
            return
        finished = request.finish_after_last(self.max_model_len)
        if finished is not None:
            self._finish(request, finished, now_us)
            return
        self._blocks.hash(request)
        self._deadlines.add(request)
        self._enqueue(request)

    def _refusal(self, request: Request) -> str | None:
        if not request.prompt_ids:
            return "the prompt is empty; it must have at least 1 token"
        if request.num_prompt_tokens >= self.max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens; at most "
                f"{self.max_model_len - 1} fit, because prompt and output together may have "
                f"{self.max_model_len}"
            )
        if len(self._waiting) >= self.limits.max_waiting:
            return f"the engine's queue is full: {self.limits.max_waiting} requests are waiting"
        return None

    def cancel(
        self, key: int, now_us: int, reason: FinishReason = "cancelled", error: str | None = None
    ) -> None:
        """End a request in whatever state it is; nothing happens if it has ended already.

        While a step computes it, it ends with that step, because its blocks are being written."""
        request = self.requests.get(key)
        if request is None:
            return
        if key in self._in_flight:
            request.abort = (reason, error)
        else:
            self._finish(request, reason, now_us, error=error)

    def cancel_all(
        self, now_us: int, reason: FinishReason = "cancelled", error: str | None = None
    ) -> None:
        for key in list(self.requests):
            self.cancel(key, now_us, reason, error)

    def take_outputs(self) -> list[Output]:
        """What happened since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        now_us: int,
        token_ids: tuple[int, ...] = (),
        error: str | None = None,
    ) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self._blocks.release(request)
        else:
            self._waiting.discard(request)
        self._deadlines.discard(request)
        del self.requests[request.key]
        self._lookups.pop(request.key, None)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.finished_us = now_us
        stop_token_id = request.token_ids[-1] if reason == "stop_token" else None
        self._outputs.append(Output(request, token_ids, reason, stop_token_id, error))

    # ------------------------------------------------------------ a step

    def schedule(self, now_us: int) -> Step:
        """Choose the next step's work and take the blocks for it; empty when there is none.

        Raises RuntimeError while a step is in flight."""
        if self._in_flight:
            raise RuntimeError("schedule() was called before the last step's update()")
        for request in self._deadlines.take_passed(now_us):
            self._finish(request, "deadline", now_us)
        plan = Plan(self.limits.max_num_batched_tokens)
        self._make_room_for_priority(plan)
        prompts: list[Request] = []
        running = self._running.copy()
        plan.drafts_left = min(plan.drafts_left, plan.tokens_left - len(running))
        block_size = self.kv.block_size
        for request in running:
            if request.status is not Status.RUNNING:
                continue  # preempted for one before it
            tokens = len(request.token_ids)
            if tokens - request.num_computed_tokens > 1:
                prompts.append(request)
            elif tokens <= len(request.block_table) * block_size or self._grow(request, plan):
                drafts = self._drafts(request, plan) if self.limits.max_drafts else ()
                plan.append(request, 1, now_us, drafts)
        plan.budget_ms = self._budget_ms(plan.shape)
        if self.limits.max_drafts:
            self._row_share = row_share(self.step_time, plan.shape)
        for request in prompts:
            self._admit_waiting(plan, now_us, request.order[:2])
            if request.status is Status.RUNNING and not self._append_chunk(request, plan, now_us):
                break
        else:
            self._admit_waiting(plan, now_us)
        self._in_flight = frozenset(plan.keys)
        return plan.step(self.step_time)

    def update(
        self,
        step: Step,
        sampled: Sequence[int | None],
        now_us: int,
        errors: Mapping[int, str] | None = None,
        further: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Take in a computed step: `sampled[i]` is the id drawn for `keys[i]`.

        It counts where the span reached the end of its sequence. Requests in `errors` end.
        `further`: by key, the ids drawn after drafts that were right, one for each of these."""
        self._in_flight = frozenset()
        further = further or {}
        for key, span, token_id in zip(step.keys, step.spans, sampled, strict=True):
            request = self.requests[key]
            request.steps += 1
            if request.abort is not None:
                reason, error = request.abort
                self._finish(request, reason, now_us, error=error)
                continue
            if errors and key in errors:
                self._finish(request, "error", now_us, error=errors[key])
                continue
            drafts = span.num_drafts
            computed = span.start + len(span.token_ids) - drafts
            request.num_computed_tokens = computed
            if request.prompt_logprobs is not None and request.wants_prompt_logprobs:
                request.prompt_logprobs_done = min(computed, request.num_prompt_tokens - 1)
            if computed < len(request.token_ids):
                self._blocks.store_full(request)
                continue
            if token_id is None:
                raise ValueError(f"request {key} reached its end but has no sampled id")
            token_ids: tuple[int, ...] = (token_id,)
            if drafts:
                more = further.get(key, ())
                token_ids = (token_id, *more)
                self._lookups[key].learn(drafts, len(more))
                self.num_drafts += drafts
                self.num_right_drafts += len(more)
            self._append_tokens(request, token_ids, now_us)

    def fail(self, step: Step, message: str, now_us: int) -> None:
        """End every request of a step that could not be computed."""
        self._in_flight = frozenset()
        for key in step.keys:
            request = self.requests[key]
            reason, error = request.abort or ("error", message)
            self._finish(request, reason, now_us, error=error)

    def abandon(self) -> None:
        """The step in flight will never be taken in, and nothing computes it any more."""
        self._in_flight = frozenset()

    def _append_tokens(self, request: Request, token_ids: tuple[int, ...], now_us: int) -> None:
        """Ids as if they had come one step after the other; all but the last are computed."""
        if request.first_token_us == 0:
            request.first_token_us = now_us
        finished: FinishReason | None = None
        taken = 0
        while finished is None and taken < len(token_ids):
            request.token_ids.append(token_ids[taken])
            taken += 1
            finished = request.finish_after_last(self.max_model_len)
        request.num_computed_tokens += taken - 1
        self._blocks.store_full(request)
        if finished is not None:
            self._finish(request, finished, now_us, token_ids=token_ids[:taken])
        else:
            self._outputs.append(Output(request, token_ids))

    # ------------------------------------------------------------ drafts

    def _drafts(self, request: Request, plan: Plan) -> Sequence[int]:
        """Ids that may follow a stream's last one, as many as pay and have a place in its blocks.

        Blocks are only taken where every running request could take another one besides."""
        most = min(
            self.limits.max_drafts,
            plan.drafts_left,
            request.num_prompt_tokens + request.max_tokens - request.num_tokens - 1,
            self.max_model_len - request.num_tokens - 1,
        )
        if most <= 0:
            return ()
        lookup = self._lookups.get(request.key)
        if lookup is None:
            lookup = self._lookups[request.key] = PromptLookup()
        drafts = lookup.draft(request.token_ids, most, self._row_share)
        lacking = self._blocks.lacking(request, request.num_tokens + len(drafts))
        if lacking > 0:
            is_free = self._blocks.num_free - len(self._running) >= lacking
            if not (request.reserved_blocks >= lacking or is_free):
                places = len(request.block_table) * self.kv.block_size
                return drafts[: places - request.num_tokens]
            self._blocks.grow(request, lacking)
        return drafts

    # ------------------------------------------------------------ chunks and admission

    def _budget_ms(self, streams: StepShape) -> float:
        """What the step may take in all, given what its running streams need.

        Prompts may double the streams' own time, so that a gap is at most about twice the
        steady TBT; beside fast streams they get an eighth of the budget, without streams all."""
        budget_ms = self.limits.step_budget_ms
        if streams.spans == 0:
            return budget_ms
        return max(budget_ms / 8, 2 * self.step_time.predict_ms(streams))

    def _append_chunk(self, request: Request, plan: Plan, now_us: int) -> bool:
        """Add a part of a prompt; False if tokens or time are used up."""
        tokens = self._chunk_tokens(request, request.num_computed_tokens, plan)
        if tokens == 0:
            return False
        plan.append(request, tokens, now_us)
        plan.num_chunks += 1
        return True

    def _chunk_tokens(self, request: Request, start: int, plan: Plan) -> int:
        remaining = request.num_tokens - start
        limit = min(remaining, plan.tokens_left)
        if request.wants_prompt_logprobs:
            limit = min(limit, max(0, plan.prompt_logits_left))
        budget_ms = plan.budget_ms
        if request.resume_ids:
            budget_ms = max(budget_ms, _RESUMED_SHARE * self.limits.step_budget_ms)
        by_time = self.step_time.largest_chunk(plan.shape, start, budget_ms)
        tokens = min(limit, by_time)
        floor = FLOOR_CHUNK_TOKENS
        if len(plan.keys) > plan.num_chunks:  # streams wait for it
            as_long = self.step_time.as_long_as(FLOOR_CHUNK_TOKENS, start)
            floor = max(_LEAST_CHUNK_TOKENS, as_long)
        least = min(limit if plan.num_chunks == 0 else remaining, floor)
        if tokens < least:
            return least if plan.num_chunks == 0 else 0
        return tokens

    def _admit_waiting(
        self, plan: Plan, now_us: int, above: tuple[int, bool] | None = None
    ) -> None:
        """Admit what fits, only what `Request.order` puts before `above`, whenever it came.

        Nobody is admitted in a step that preempts: blocks are short."""
        if plan.preempted or not self.admits:
            return
        deferred: list[Request] = []
        while len(self._running) < self.limits.max_num_seqs and plan.tokens_left > 0:
            request = self._waiting.peek()
            if request is None or len(deferred) == _MAX_DEFERRED:
                break
            if above is not None and request.order[:2] >= above:
                break
            matched = self._blocks.match(request)
            if self._prefix_is_coming(request, matched):
                self._waiting.discard(request)
                deferred.append(request)
                continue
            start = len(matched) * self.kv.block_size
            if not self._chunk_tokens(request, start, plan) or not self._admit(request, matched):
                break
            plan.admitted.append(request.key)
            self._append_chunk(request, plan, now_us)
        for request in deferred:
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        matched = len(self._blocks.match(request)) * self.kv.block_size
        request.uncached_tokens = request.num_tokens - matched
        self._waiting.push(request)

    def _prefix_is_coming(self, request: Request, matched: Sequence[int]) -> bool:
        """Whether a running request is about to compute this one's next block: worth the wait.

        Not for a less important one, which may itself wait for whatever runs between the two."""
        key = self._blocks.computed_by(request, matched)
        return key is not None and self.requests[key].priority <= request.priority

    def _shortage(self, request: Request, matched: Sequence[int]) -> int:
        return self._blocks.shortage(request, matched, len(self._running))

    def _admit(self, request: Request, matched: Sequence[int]) -> bool:
        """Give a waiting request its blocks and let it run; False if they are lacking."""
        if self._shortage(request, matched) > 0:
            return False
        self._waiting.discard(request)
        self._blocks.take(request, matched)
        if request.first_scheduled_us == 0 and request.preemptions == 0:
            request.cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.prefix_hit_tokens += request.num_computed_tokens
            self.prefix_query_tokens += request.num_tokens
        request.status = Status.RUNNING
        insort(self._running, request, key=lambda running: running.order)
        return True

    # ------------------------------------------------------------ blocks run out

    def _grow(self, request: Request, plan: Plan) -> bool:
        """Take the block for one more token; False if the request had to give way itself."""
        while not self._blocks.grow(request):
            victim = self._victim(request)
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _victim(self, request: Request) -> Request:
        """The last that is not protected, at the latest `request`, which is not."""
        for running in reversed(self._running):
            if not self._blocks.is_protected(running):
                return running
        raise RuntimeError(f"protected request {request.key} lacks a block it had reserved")

    def _preempt(self, request: Request, plan: Plan) -> None:
        self._running.remove(request)
        self._blocks.release(request)
        request.num_computed_tokens = 0
        request.preemptions += 1
        request.status = Status.WAITING
        self._enqueue(request)
        self.num_preemptions += 1
        plan.preempted.append(request.key)

    def _make_room_for_priority(self, plan: Plan) -> None:
        """Preempt for the first waiting request where only less important ones are in its way."""
        request = self._waiting.peek()
        if request is None or not self._running:
            return
        if self._running[-1].priority <= request.priority:
            return
        matched = self._blocks.match(request)
        shortage = self._shortage(request, matched)
        slots_lacking = len(self._running) + 1 - self.limits.max_num_seqs
        if shortage <= 0 and slots_lacking <= 0:
            return
        victims: list[Request] = []
        matched_blocks = set(matched)
        for running in reversed(self._running):
            if running.priority <= request.priority:
                return
            if not self._blocks.is_protected(running):
                victims.append(running)
                shortage -= self.kv.num_sole(running.block_table, matched_blocks)
                if shortage <= 0 and len(victims) >= slots_lacking:
                    break
        else:
            return
        for victim in victims:
            self._preempt(victim, plan)
        matched = self._blocks.match(request)
        if self._admit(request, matched):
            plan.admitted.append(request.key)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, queues and reservations agree."""
        self._blocks.check_integrity(self._running)
        orders = [request.order for request in self._running]
        if orders != sorted(orders):
            raise AssertionError("running requests are out of order")
        queued = {request.key for request in self._waiting}
        running = {request.key for request in self._running}
        if queued & running or queued | running != self.requests.keys():
            raise AssertionError("a request is in two places, or in none")
        if any(request.block_table for request in self._waiting):
            raise AssertionError("a waiting request holds blocks")
