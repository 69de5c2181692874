"""Guesses a request's next tokens from its own text (prompt lookup; Saxena, 2023). Pure.

    ... the cat sat on the mat . the cat sat   ?    the last three ids were there before:
              `------------------'                  what followed them is the draft

A step computes the drafts behind the last token, and samples after each of them. A draft that is
the id that was sampled in its place has saved a step; the first that is not, and all behind it, are
forgotten. What is emitted was sampled, with the noise of its place: drafts change when a token
comes, never which.

How many to draft. With R streams a step of T ms makes R tokens, so a token is worth T / R ms. The
j-th draft costs a row of the step, and is emitted if it and those before it are right: with a
share a of right drafts, a^j of a token. Drafts go on while a^j T / R is above a row's time. Where
few were right there are none; what is known of them fades, so that they are tried again.
"""

from collections.abc import Sequence

from scalellm.engine.step_time import StepShape, StepTime

NGRAM_TOKENS = 3
_INDEXED_AT_ONCE = 2048  # tokens, so that a long prompt holds no step up
_FADE_TRIED = 0.9  # of earlier drafts' weight, with each step of drafts
_FADE_UNTRIED = 0.98  # with each step that had something to draft and did not
_LEAST_SHARE = 0.25  # of right drafts


class PromptLookup:
    """One request's n-grams, and how its drafts fared."""

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}  # n-gram -> one past its latest place
        self._indexed = NGRAM_TOKENS - 1  # n-grams that end at or before it are known
        self._right = 0.0
        self._tried = 0.0

    @property
    def share(self) -> float:
        """Of the drafts that were reached, how many were right; a half before any was."""
        return (self._right + 1.0) / (self._tried + 2.0)

    def draft(self, token_ids: Sequence[int], most: int, row_share: float) -> list[int]:
        """At most `most` ids that may follow; `row_share`: a row's time in those of a token."""
        count = self._count(most, row_share)
        place = self._place(token_ids)
        if place is None:
            return []
        if count == 0:
            self._right *= _FADE_UNTRIED
            self._tried *= _FADE_UNTRIED
            return []
        drafts = list(token_ids[place : place + count])
        # What follows runs into the end: the text repeats itself, and may go on doing so.
        period = len(token_ids) - place
        while len(drafts) < count:
            drafts.append(drafts[len(drafts) - period])
        return drafts

    def learn(self, drafted: int, right: int) -> None:
        """Of `drafted` ids the first `right` were sampled too; behind a wrong one none counts."""
        self._right = self._right * _FADE_TRIED + right
        self._tried = self._tried * _FADE_TRIED + min(drafted, right + 1)

    def _count(self, most: int, row_share: float) -> int:
        share = self.share
        if share < _LEAST_SHARE:
            return 0
        count, emitted = 0, share
        while count < most and emitted > row_share:
            count += 1
            emitted *= share
        return count

    def _place(self, token_ids: Sequence[int]) -> int | None:
        """Where what followed the last n-gram begins, None if it is new or not yet looked for."""
        end = len(token_ids)
        until = min(end - 1, self._indexed + _INDEXED_AT_ONCE)
        for place in range(self._indexed + 1, until + 1):
            self._end_of[tuple(token_ids[place - NGRAM_TOKENS : place])] = place
        self._indexed = max(self._indexed, until)
        if self._indexed < end - 1:
            return None
        return self._end_of.get(tuple(token_ids[-NGRAM_TOKENS:]))


def row_share(step_time: StepTime, streams: StepShape) -> float:
    """A draft's time in a token's, in a step of so many streams; `streams` may count drafts."""
    if streams.spans == 0:
        return 0.0
    context = streams.attended / streams.tokens
    plain = StepShape(streams.spans, streams.spans * context, streams.spans)
    more = StepShape(plain.tokens + 1, plain.attended + context, plain.spans)
    plain_ms = step_time.predict_ms(plain)
    more_ms = step_time.predict_ms(more) - plain_ms
    return more_ms / (plain_ms / plain.spans) if plain_ms > 0.0 else 0.0
