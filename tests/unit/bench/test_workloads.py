import json

import numpy as np
import pytest

from scalellm.bench.lengths import PRESETS, Fixed, LogNormal, parse_lognormal
from scalellm.bench.plan import Client, Level, Workload
from scalellm.bench.prefix import reused_share, shared_prefixes
from scalellm.bench.schedule import schedule, trace_rate
from scalellm.bench.shapes import RequestShape, cut
from scalellm.bench.sources import Conversations, Recorded, Synthetic, describe_shapes
from scalellm.bench.traces import read_prompts, read_trace
from scalellm.cli.bench_workload import _NAMED
from scalellm.errors import ConfigError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_draw_the_lognormals_of_their_traces(name) -> None:
    preset = PRESETS[name]
    source = Synthetic(LogNormal(*preset.input), LogNormal(*preset.output))
    shapes = source.draw(20_000, rng())
    for tokens, (mu, sigma) in (
        ([shape.input_tokens for shape in shapes], preset.input),
        ([shape.output_tokens for shape in shapes], preset.output),
    ):
        logs = np.log(tokens)
        assert logs.mean() == pytest.approx(mu, abs=0.06)
        assert logs.std() == pytest.approx(sigma, abs=0.06)
    assert set(_NAMED) == set(PRESETS)


def test_lengths_are_scaled_and_cut() -> None:
    assert max(LogNormal(8, 2, at_most=500).draw(1000, rng())) == 500
    assert min(LogNormal(0, 3).draw(1000, rng())) == 1
    whole, half = (np.mean(LogNormal(6, 1, scale).draw(5000, rng())) for scale in (1.0, 0.5))
    assert half / whole == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("text", ["6.63", "a/b", "-1/1", "30/1", "1/9", "1/2/3"])
def test_bad_distributions_are_refused(text) -> None:
    with pytest.raises(ConfigError, match="--input-lognormal: got"):
        parse_lognormal("input-lognormal", text, 1.0, None)


@pytest.mark.parametrize("share", [0.37, 0.5, 0.64])
def test_prefixes_repeat_the_share_that_was_asked_for(share) -> None:
    lengths = LogNormal(8.74, 1.20).draw(2000, rng())
    prefixes = shared_prefixes(lengths, share, 512, rng(1))
    assert reused_share(prefixes, lengths, 512) == pytest.approx(share, abs=0.02)
    assert len(set(prefixes)) == len(prefixes), "nobody asks the same twice"


def test_reuse_counts_whole_prefixes_only() -> None:
    assert reused_share([(1, 2), (1, 3), (4, 2)], [20, 20, 20], 10) == pytest.approx(10 / 60)
    assert reused_share([(1, 2), (1, 2)], [15, 15], 10) == pytest.approx(15 / 30)


def test_the_mooncake_preset_reuses_half() -> None:
    preset = PRESETS["mooncake"]
    source = Synthetic(LogNormal(*preset.input), LogNormal(*preset.output), preset.prefix_reuse)
    described = describe_shapes(source.draw(1000, rng()))
    assert described["prefix_reuse"] == pytest.approx(0.5, abs=0.03)


def test_conversations_share_system_prompts() -> None:
    shapes = Conversations(Fixed(20), Fixed(5), turns=3, systems=2).draw(50, rng())
    assert {shape.system_id for shape in shapes} == {0, 1}
    assert all(len(shape.turns) == 2 for shape in shapes)
    thinking = Conversations(Fixed(20), Fixed(5), turns=9, think_s=2.0).draw(500, rng())
    waits = [turn.after_s for shape in thinking for turn in shape.turns]
    assert np.mean(waits) == pytest.approx(2.0, rel=0.1)


def test_a_request_is_cut_to_the_context() -> None:
    assert cut(RequestShape(900, 200), 1000) == RequestShape(800, 200)
    assert cut(RequestShape(10, 5000), 1000) == RequestShape(1, 999)
    assert cut(RequestShape(10, 20), 1000) == RequestShape(10, 20)


def test_clients_add_up_each_with_its_own_burstiness() -> None:
    clients = (
        Client("steady", 1.0, "constant", Synthetic(Fixed(10), Fixed(1))),
        Client("bursty", 3.0, "gamma:4", Synthetic(Fixed(20), Fixed(2))),
    )
    level = Level(rate=40.0, arrivals="clients", duration_s=200.0, warmup=50)
    found = schedule(level, Workload(clients=clients), 0)
    assert len(found.shapes) == len(found.send_at_s) + 50
    assert list(found.send_at_s) == sorted(found.send_at_s)
    measured = list(zip(found.shapes[50:], found.send_at_s, strict=True))
    for name, rate, cv, tokens in (("steady", 10.0, 0.0, 10), ("bursty", 30.0, 4.0, 20)):
        times = [at for shape, at in measured if shape.client == name]
        gaps = np.diff(times)
        assert {shape.input_tokens for shape, _ in measured if shape.client == name} == {tokens}
        assert len(times) / 200.0 == pytest.approx(rate, rel=0.2)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.2, abs=1e-6)
    assert {shape.client for shape in found.shapes[:50]} == {"steady", "bursty"}


def test_equal_seeds_and_numbers_give_equal_schedules() -> None:
    level = Level(rate=10.0, duration_s=5.0)
    drawn = [
        schedule(level, Workload(seed=seed), number)
        for seed, number in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]


def test_a_warm_up_does_not_warm_the_cache_for_what_is_measured() -> None:
    source = Synthetic(Fixed(1000), Fixed(1), prefix_reuse=0.5)
    found = schedule(Level(concurrency=2, requests=10, warmup=3), Workload(source=source), 0)
    assert [bool(shape.blocks) for shape in found.shapes] == [False] * 3 + [True] * 10


MOONCAKE = [
    {"timestamp": 3000, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]},
    {"timestamp": 1000, "input_length": 600, "output_length": 8, "hash_ids": [1, 3]},
]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
AZURE += "2023-11-16 18:15:50.6805900,396,109\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST += "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,Conversation log\n"


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_mooncake_trace_keeps_times_lengths_and_prefixes(tmp_path) -> None:
    path = write(tmp_path / "trace.jsonl", "".join(json.dumps(row) + "\n" for row in MOONCAKE))
    first, second = read_trace(path).shapes
    assert (first.offset_s, first.input_tokens, first.output_tokens) == (0.0, 600, 8)
    assert (second.offset_s, second.blocks, second.block_tokens) == (2.0, (1, 2), 512)
    halved = read_trace(path, scale=0.5).shapes[0]
    assert (halved.input_tokens, halved.block_tokens) == (300, 256)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(AZURE, [(0.0, 374, 44), (4.0, 396, 109)]), (BURST, [(0.0, 472, 18), (40.0, 1087, 230)])],
)
def test_csv_traces_are_told_by_their_fields(tmp_path, text, expected) -> None:
    shapes = read_trace(write(tmp_path / "trace.csv", text)).shapes
    found = [(shape.offset_s, shape.input_tokens, shape.output_tokens) for shape in shapes]
    assert found == expected


def test_a_trace_plays_at_the_asked_rate_until_the_levels_end() -> None:
    shapes = tuple(RequestShape(at + 1, 1, offset_s=float(at)) for at in range(11))
    source = Recorded(shapes, "trace", "t")
    rate = trace_rate(shapes, 2.0)
    level = Level(rate=rate, arrivals="trace", duration_s=3.0)
    found = schedule(level, Workload(source=source), 0)
    assert found.send_at_s == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert [shape.input_tokens for shape in found.shapes] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="needs a trace"):
        schedule(level, Workload(), 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no requests"),
        ("a.jsonl", "[1]", "line 1: got '\\[1\\]', allowed: a JSON object"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 5}', "line 1: needs a number of tokens"),
        ("a.jsonl", '\n{"input_length": 5, "output_length": 1}', "line 2: needs a time"),
        ("a.jsonl", '{"timestamp":1,"input_length":5,"output_length":1,"hash_ids":3}', "hash_ids"),
        ("a.csv", "Timestamp,Request tokens\n1,2\n", "line 2: needs a number of tokens"),
    ],
)
def test_damaged_traces_name_file_and_line(tmp_path, name, text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path / name, text))


def test_real_prompts_are_read_as_they_are(tmp_path) -> None:
    lines = [
        {"prompt": "one", "max_tokens": 7},
        {"messages": [{"role": "user", "content": "two"}]},
        {"text": "three", "output_tokens": 5},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(line) for line in lines))
    shapes = read_prompts(path, "chat", 64).shapes
    assert [shape.prompt.text for shape in shapes] == ["one", None, "three"]
    assert [shape.output_tokens for shape in shapes] == [7, 64, 5]
    plain = read_prompts(write(tmp_path / "p.txt", "a b\n\nc\n"), "completions", 9).shapes
    assert [shape.prompt.text for shape in plain] == ["a b", "c"]
    with pytest.raises(ConfigError, match=r"p.jsonl, line 2: needs prompt or text"):
        read_prompts(path, "completions", 64)
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "absent.txt", "chat", 64)
