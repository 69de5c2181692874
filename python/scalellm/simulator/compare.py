"""The policy beside every static plan, over the same load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalellm.controller.blueprint.cost import Calibration
from scalellm.controller.blueprint.journal import Policy
from scalellm.controller.blueprint.policy import Settings
from scalellm.controller.blueprint.shape import Blueprint
from scalellm.simulator.cluster import Cluster, Run
from scalellm.simulator.report import Objectives, Summary, summarise
from scalellm.simulator.requests import Load

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Setup:
    """What all runs of a comparison have in common; `load` is called anew for each."""

    calibration: Calibration
    load: Callable[[], Load]
    routing: str = "least-load"
    exact: bool = False


def run_static(setup: Setup, blueprint: Blueprint) -> tuple[Run, float]:
    """The run, and for how many seconds requests were sent."""
    load = setup.load()
    cluster = Cluster(load, setup.calibration, blueprint, routing=setup.routing, exact=setup.exact)
    return cluster.run(), load.span_ms / 1e3


def run_auto(
    setup: Setup,
    candidates: Sequence[Blueprint],
    first: Blueprint,
    settings: Settings,
    journal: Path | None = None,
) -> tuple[Run, float]:
    load = setup.load()
    policy = Policy(setup.calibration, settings, candidates, 0.0, journal)
    cluster = Cluster(
        load, setup.calibration, first, routing=setup.routing, policy=policy, exact=setup.exact
    )
    return cluster.run(), load.span_ms / 1e3


def best(summaries: Sequence[Summary]) -> Summary:
    """The static plan with the highest goodput; of equals that with the most tokens a second."""
    return max(
        (summary for summary in summaries if summary.plan != AUTO),
        key=lambda summary: (summary.goodput_request_s, summary.output_tok_s),
    )


def summary_of(name: str, run: tuple[Run, float], objectives: Objectives) -> Summary:
    return summarise(name, run[0], objectives, run[1])
