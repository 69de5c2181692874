"""A profile for the terminal: waterfalls, the largest parts, and what their end would gain."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scalellm.bench.profile import Inside, LevelProfile, Profile
from scalellm.bench.profile_outside import Outside
from scalellm.bench.profile_stages import Share, Waterfall
from scalellm.bench.table import milliseconds

_BAR_WIDTH = 30
# Stages below this share of the wait are summed up in one line for each place.
_SMALL_SHARE = 0.002
_PREDICTIONS = 3


def print_profile(profile: Profile, console: Console, every_stage: bool = False) -> None:
    for level in profile.levels:
        console.rule(f"{_title(level)}: {level.row['completed']} requests", align="left")
        if level.inside is not None:
            _print_inside(level.inside, console, every_stage)
        if level.outside is not None:
            _print_outside(level.outside, console)
        for note in level.notes:
            console.print(Text(note, style="yellow"), soft_wrap=True)


def _title(level: LevelProfile) -> str:
    if level.level.rate is not None:
        return f"{level.level.rate:g} requests/s"
    return f"{level.level.concurrency} concurrent"


def _print_inside(inside: Inside, console: Console, every_stage: bool) -> None:
    waterfalls = [("first token", inside.first)]
    if inside.token is not None:
        waterfalls.append(("each further token", inside.token))
    for name, waterfall in waterfalls:
        console.print(_table(name, waterfall, every_stage))
        console.print(
            Text(
                f"gateway and engine account for {waterfall.inside_share:.1%} of the "
                f"{milliseconds(waterfall.whole_ms)} ms that the client measured",
                style="dim",
            ),
            soft_wrap=True,
        )
    beside = ", ".join(f"{name} {ms * 1e3:.0f} us" for name, ms in inside.beside_ms.items())
    console.print(
        Text(f"for each token, while the engine computes the next: {beside}", style="dim"),
        soft_wrap=True,
    )
    for name, waterfall in [*waterfalls, ("the whole answer", inside.answer)]:
        for line in predictions(name, waterfall):
            console.print(line, soft_wrap=True)


def predictions(name: str, waterfall: Waterfall) -> Iterator[str]:
    """What a user would gain by the end of the largest parts, one line each."""
    largest = sorted(waterfall.shares, key=lambda share: share.mean_ms, reverse=True)
    for rank, share in enumerate(largest[:_PREDICTIONS]):
        if share.share < 0.01:
            return
        without_ms = share.without_ms(waterfall.whole_ms)
        verb = "is largest" if rank == 0 else "takes"
        yield (
            f"{name}: {share.stage} ({share.place}) {verb}, {share.share:.0%}; without it "
            f"{milliseconds(waterfall.whole_ms)} -> {milliseconds(without_ms)} ms"
            + (f", {waterfall.whole_ms / without_ms:.2f}x" if without_ms else "")
        )


def _table(name: str, waterfall: Waterfall, every_stage: bool) -> Table:
    title = f"{name}: {milliseconds(waterfall.whole_ms)} ms"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("where")
    table.add_column("stage", no_wrap=True)
    for column in ("mean ms", "p99 ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    begins = 0.0
    for share in waterfall.shares if every_stage else _without_small(waterfall.shares):
        table.add_row(
            share.place,
            share.stage,
            f"{share.mean_ms:.3f}",
            "-" if share.p99_ms is None else f"{share.p99_ms:.3f}",
            f"{share.share:.1%}",
            _bar(begins, share.share),
        )
        begins += share.share
    return table


def _without_small(shares: tuple[Share, ...]) -> Iterator[Share]:
    """Neighbours of one place that are too small to matter become one line."""
    small: list[Share] = []
    for share in shares:
        if small and (abs(share.share) >= _SMALL_SHARE or share.place != small[0].place):
            yield _summed(small)
            small = []
        if abs(share.share) >= _SMALL_SHARE:
            yield share
        else:
            small.append(share)
    if small:
        yield _summed(small)


def _summed(small: list[Share]) -> Share:
    if len(small) == 1:
        return small[0]
    mean_ms, share = sum(s.mean_ms for s in small), sum(s.share for s in small)
    names = f"{small[0].stage} .. {small[-1].stage}"
    return Share(small[0].place, names, mean_ms, None, share)


def _bar(begins: float, share: float) -> str:
    """The part of the whole wait that a stage takes, where it takes it."""
    first = round(max(0.0, min(1.0, begins)) * _BAR_WIDTH)
    end = round(max(0.0, min(1.0, begins + share)) * _BAR_WIDTH)
    return " " * first + ("█" * (end - first) or "▏")


def _print_outside(outside: Outside, console: Console) -> None:
    title = f"first token: {milliseconds(outside.ttft_ms)} ms, seen from outside"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for column in ("part", "mean ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, ms in outside.ttft_parts():
        table.add_row(name, milliseconds(ms), f"{ms / outside.ttft_ms:.1%}")
    console.print(table)
    tbt_ms, front_ms = outside.tbt_ms, outside.front_tbt_ms
    if tbt_ms is not None:
        front = "" if front_ms is None else f"; ScaleLLM's front alone {milliseconds(front_ms)} ms"
        console.print(f"each further token: {milliseconds(tbt_ms)} ms{front}", soft_wrap=True)
    console.print(
        Text("this endpoint does not tell its stages: parts are differences between measurements"),
        style="dim",
        soft_wrap=True,
    )
