"""The vectorised sampler against one written row by row in float64."""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm.engine.draw import GROUP
from scalellm.engine.logprobs import logprobs_in_torch, token_logprobs
from scalellm.engine.noise import gumbel, row_keys
from scalellm.engine.request import Request, Sampling
from scalellm.engine.sampler import Sampler
from scalellm.kernels.sampling import DRAW, draw

MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def request_of(key: int = 1, prompt: list[int] | None = None, **more: Any) -> Request:
    fields = {name: more.pop(name) for name in list(more) if name in Sampling.__slots__}
    resume = more.pop("output", [])
    return Request(key, prompt or [1], 100, sampling=Sampling(**fields), resume_ids=resume, **more)


def splitmix(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def reference_noise(seed: int, choice: int, index: int, counter: int) -> float:
    weyl = 0x9E3779B97F4A7C15
    key = splitmix((seed + weyl) & MASK)
    key = splitmix(key ^ ((choice * weyl) & MASK))
    key = splitmix((key + (index + 1) * weyl) & MASK)
    bits = splitmix((key + (counter + 1) * weyl) & MASK)
    return -math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52))


def reference_scores(logits: np.ndarray, request: Request) -> np.ndarray:
    scores = logits.astype(np.float64).copy()
    sampling = request.sampling
    output = request.token_ids[request.num_prompt_tokens :]
    for token in set(request.token_ids):
        factor = sampling.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(output).items():
        scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    if len(output) < request.min_tokens:
        for token in request.eos_token_ids | request.stop_token_ids:
            scores[token] = -math.inf
    return scores


def reference_values(logits: np.ndarray, request: Request) -> np.ndarray:
    """What the arg-max is taken of, by id; for untruncated rows the drawn group's ids alone."""
    scores = reference_scores(logits, request)
    sampling = request.sampling
    if sampling.temperature < 1e-5:
        return scores
    scores = (scores - scores.max()) / sampling.temperature
    index = request.num_output_tokens

    def noise(counter: int) -> float:
        return reference_noise(sampling.seed, sampling.choice, index, counter)

    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        groups = [scores[i : i + GROUP] for i in range(0, len(scores), GROUP)]
        mass = [math.log(np.exp(group).sum()) + noise(i) for i, group in enumerate(groups)]
        group = int(np.argmax(mass))
        keep = np.arange(len(scores)) // GROUP == group
    else:
        keep = np.ones(len(scores), dtype=bool)
        if 0 < sampling.top_k < len(scores):
            keep &= scores >= np.sort(scores)[-sampling.top_k]
        weights = np.where(keep, np.exp(scores), 0.0)
        order = np.argsort(-weights, kind="stable")
        before = np.concatenate(([0.0], np.cumsum(weights[order])[:-1])) / weights.sum()
        if sampling.top_p < 1:
            keep[order[before >= sampling.top_p]] = False
        keep &= np.exp(scores) >= sampling.min_p
    return np.array(
        [
            score + noise((1 << 40) + i) if kept else -math.inf
            for i, (score, kept) in enumerate(zip(scores, keep, strict=True))
        ]
    )


def random_request(rng: random.Random, key: int, vocab: int) -> Request:
    def some(*values: Any) -> Any:
        return rng.choice(values)

    return request_of(
        key,
        prompt=[rng.randrange(vocab) for _ in range(rng.randrange(1, 9))],
        output=[rng.randrange(vocab) for _ in range(rng.randrange(0, 9))],
        temperature=some(0.0, 0.3, 1.0, 1.7),
        top_k=some(0, 0, 1, 3, 40, vocab, vocab + 9),
        top_p=some(1.0, 1.0, 0.9, 0.5, 1e-6, 0.99999),
        min_p=some(0.0, 0.0, 0.1, 0.9, 1.0),
        repetition_penalty=some(1.0, 1.0, 1.3, 0.7),
        presence_penalty=some(0.0, 0.0, 1.5, -1.0),
        frequency_penalty=some(0.0, 0.0, 0.7, -2.0),
        logit_bias=some((), (), ((3, 4.0), (5, -100.0))),
        seed=rng.getrandbits(64),
        choice=rng.randrange(4),
        min_tokens=some(0, 0, 5),
        eos_token_ids=frozenset({0}),
        stop_token_ids=frozenset({2, 4}),
    )


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([7, 300, 512, 1100]), st.booleans())
def test_every_row_is_what_the_reference_would_draw(seed: int, vocab: int, kernels: bool) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, key, vocab) for key in range(rng.randrange(1, 10))]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((len(requests), vocab), generator=generator) * rng.choice([0.5, 3.0, 12.0])
    before = logits.clone()
    sampler = Sampler(vocab, kernels)
    for _ in range(2):
        sampled = sampler.sample(logits, requests)
        assert torch.equal(logits, before) and not sampled.errors
        for row, request in enumerate(requests):
            values = reference_values(logits[row].numpy(), request)
            drawn = sampled.token_ids[row]
            assert values[drawn] >= values.max() - 1e-4, request.sampling
        for request, token in zip(requests, sampled.token_ids, strict=True):
            request.token_ids.append(token)


def test_kernels_draw_what_torch_draws() -> None:
    rng = random.Random(11)
    for vocab in (7, 513, 3000):
        requests = [random_request(rng, key, vocab) for key in range(200)]
        logits = torch.randn((200, vocab), generator=torch.Generator().manual_seed(vocab)) * 3
        drawn = [Sampler(vocab, kernels).sample(logits, requests) for kernels in (True, False)]
        assert drawn[0].token_ids == drawn[1].token_ids


def test_logprobs_by_kernels_are_those_by_torch() -> None:
    logits = torch.randn((9, 777), generator=torch.Generator().manual_seed(1)) * 4
    token_ids, alternatives = [5, 700, 1, 2, 3, 4, 776, 0, 9], [0, 1, 20, 3, 777, 0, 5, 2, 1]
    found = token_logprobs(logits, token_ids, alternatives)
    for entry, right in zip(found, logprobs_in_torch(logits, token_ids, alternatives), strict=True):
        assert (entry[0], *entry[2:4]) == (right[0], *right[2:4])
        assert [entry[1], *entry[4]] == pytest.approx([right[1], *right[4]], abs=1e-5)


def test_scores_that_the_kernels_cannot_read_are_refused() -> None:
    draws = np.zeros(2, dtype=DRAW)
    for scores in (torch.zeros(2, 5, dtype=torch.float64), torch.zeros(10), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match=r"float|for scores"):
            draw(scores, draws)
    assert draw(torch.zeros(5, 2).t(), draws) == [0, 0]


@pytest.mark.parametrize(
    ("more", "largest"),
    [
        ({}, True),
        ({"top_p": 0.5, "seed": 3}, True),
        ({"temperature": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": ((1, 1.0),)}, False),
        ({"logprobs": 0}, False),
        ({"prompt": [1, 2], "prompt_logprobs": 0}, False),
        ({"min_tokens": 2, "output": [1]}, False),
        ({"min_tokens": 2, "output": [1, 1]}, True),
    ],
)
def test_when_the_largest_logit_is_all_that_is_asked_for(
    more: dict[str, Any], largest: bool
) -> None:
    assert request_of(**{"temperature": 0.0, **more}).takes_largest_logit is largest


@pytest.mark.parametrize(
    ("more", "few"),
    [
        ({"temperature": 0.0}, True),
        ({}, False),
        ({"top_k": 64}, True),
        ({"top_k": 65}, False),
        ({"top_k": 65, "temperature": 0.0}, True),
        ({"top_k": 20, "top_p": 0.9, "min_p": 0.1, "seed": 3}, True),
        ({"top_p": 0.9}, False),
        ({"top_k": 20, "presence_penalty": 0.1}, False),
        ({"top_k": 20, "logit_bias": ((1, 1.0),)}, False),
        ({"top_k": 20, "logprobs": 0}, False),
        ({"top_k": 20, "prompt": [1, 2], "prompt_logprobs": 0}, False),
        ({"top_k": 20, "min_tokens": 2, "output": [1]}, False),
    ],
)
def test_when_a_few_of_the_largest_logits_are_all_that_is_asked_for(
    more: dict[str, Any], few: bool
) -> None:
    assert request_of(**{"temperature": 1.0, **more}).takes_few_logits is few


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = random.Random(5)
    requests = [random_request(rng, key, 2000) for key in range(40)]
    logits = torch.randn((40, 2000), generator=torch.Generator().manual_seed(5)) * 2
    together = Sampler(2000).sample(logits, requests).token_ids
    single = [
        Sampler(2000).sample(logits[row : row + 1], [request]).token_ids[0]
        for row, request in enumerate(requests)
    ]
    backwards = Sampler(2000).sample(logits.flip(0), requests[::-1]).token_ids[::-1]
    assert together == single == backwards


@pytest.mark.parametrize("extra", [{}, {"top_k": 8}, {"top_p": 0.9999999}, {"min_p": 1e-9}])
def test_draws_follow_the_distribution(extra: dict[str, Any]) -> None:
    """Chi-square over 6 likely ids in 2 groups: 5 degrees of freedom, 0.1% critical value 20.5."""
    probabilities = {3: 0.35, 4: 0.25, 200: 0.15, 511: 0.1, 512: 0.1, 700: 0.05}
    logits = torch.full((64, 900), -60.0)
    for token, probability in probabilities.items():
        logits[:, token] = math.log(probability)
    counts: Counter[int] = Counter()
    draws = 0
    for index in range(60):
        requests = [
            request_of(key, seed=key, output=[1] * index, temperature=1.0, **extra)
            for key in range(64)
        ]
        counts.update(Sampler(900).sample(logits, requests).token_ids)
        draws += 64
    assert counts.keys() <= probabilities.keys()
    statistic = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in probabilities.items())
    assert statistic < 20.5


def test_the_noise_is_gumbel_and_differs_by_every_part_of_its_key() -> None:
    """Kolmogorov-Smirnov at 0.1%: 1.95 / sqrt(n)."""
    keys = torch.from_numpy(row_keys(range(50), [0] * 50, [0] * 50)).unsqueeze(1)
    drawn = gumbel(keys, torch.arange(400)).flatten().sort().values
    expected = torch.exp(-torch.exp(-drawn))
    distance = (expected - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
    assert distance < 1.95 / math.sqrt(20_000)
    parts = [(s, c, i) for s in (0, 1, 2**63, 2**64 - 1) for c in (0, 1) for i in (0, 1, 2)]
    assert len(set(row_keys(*zip(*parts, strict=True)).tolist())) == len(parts)


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros((3, 1500))
    logits[0, [700, 1400]] = 2.0
    logits[1, [511, 512]] = 2.0
    requests = [request_of(key, temperature=0.0) for key in range(3)]
    assert Sampler(1500).sample(logits, requests).token_ids == [700, 511, 0]


def test_a_tiny_top_p_still_draws_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9]])
    for seed in range(20):
        sampled = Sampler(4).sample(logits, [request_of(top_p=1e-9, seed=seed)])
        assert sampled.token_ids == [1]


def test_top_p_keeps_the_id_that_crosses_the_border() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {
        Sampler(4).sample(logits, [request_of(top_p=0.6, seed=seed)]).token_ids[0]
        for seed in range(200)
    }
    assert drawn == {0, 1}


def test_logits_that_are_not_numbers_are_an_error_of_their_row_alone() -> None:
    logits = torch.randn((6, 40))
    logits[0, 3] = math.nan
    logits[2, 3] = math.inf
    logits[4] = -math.inf
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}]
    for kind in kinds:
        requests = [request_of(key, logprobs=1, **kind) for key in range(6)]
        sampled = Sampler(40).sample(logits, requests)
        assert sampled.errors.keys() == {0, 2, 4} and sampled.logprobs.keys() == {1, 3, 5}
        assert "not finite" in sampled.errors[0]
        assert [row for row in range(6) if sampled.token_ids[row] is None] == [0, 2, 4]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    request = request_of(temperature=0.0, logprobs=2, logit_bias=((0, 100.0),))
    token, logprob, rank, ids, values = Sampler(4).sample(logits, [request]).logprobs[0]
    expected = logits[0].double().log_softmax(-1)
    assert (token, rank, ids) == (0, 4, [1, 3])
    assert logprob == pytest.approx(float(expected[0]), abs=1e-5)
    assert values == pytest.approx([float(expected[1]), float(expected[3])], abs=1e-5)


def test_logprobs_of_excluded_ids_are_finite_and_counts_go_up_to_the_vocabulary() -> None:
    logits = torch.tensor([[0.0, -math.inf]])
    entry = Sampler(2).sample(logits, [request_of(temperature=0.0, logprobs=20)]).logprobs[0]
    assert entry == (0, 0.0, 1, [0, 1], [0.0, -9999.0])


def test_min_tokens_excludes_every_end_until_then() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    request = request_of(
        temperature=0.0,
        min_tokens=2,
        eos_token_ids=frozenset({0}),
        stop_token_ids=frozenset({1}),
    )
    sampler = Sampler(4)
    drawn = []
    for _ in range(3):
        drawn.append(sampler.sample(logits, [request]).token_ids[0])
        request.token_ids.append(drawn[-1])
    assert drawn == [2, 2, 0]


def test_a_forgotten_request_leaves_nothing_behind() -> None:
    sampler = Sampler(4)
    sampler.sample(torch.zeros((1, 4)), [request_of(key=7, presence_penalty=1.0)])
    assert list(sampler._seen) == [7]
    sampler.forget(7)
    assert not sampler._seen
