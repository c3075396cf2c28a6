"""The goals of the project, and whether the kept results reach them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.reporting.options import has_options, options_of
from experiments.reporting.tables import (
    Jobs,
    finished,
    markdown,
    mean_and_error,
    means_by_strength,
    strength_of,
)


@dataclass(frozen=True)
class Goal:
    """A value that was set out to be reached: by default the mean accuracy of jobs in percent.

    Attributes:
        name: what is measured.
        at_least: the smallest value that meets the goal.
        at_most: the largest one.  Without either the value is only shown.
        published: what others have published.
        recipe: the recipe of the jobs.
        settings: the options of the jobs that count.
        decades: the value is the decades of strength within a point of the best.
        default: the value is the points by which this strength is under the best one, on the seeds
            that both have.  There is no verdict if it is the smallest or largest strength.
        values: the accuracies that a command of the remark printed, where no recipe runs the jobs.
        remark: sentences below the table.
    """

    name: str
    at_least: float | None = None
    at_most: float | None = None
    published: float | str = ""
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    decades: bool = False
    default: float | None = None
    values: Sequence[float] = ()
    remark: Sequence[str] = ()

    @property
    def bar(self) -> float | None:
        """The number that the value is compared with."""
        return self.at_most if self.at_least is None else self.at_least

    def verdict(self, value: float | None) -> str:
        """Whether a value meets the goal; empty without a value or without a bar."""
        if value is None or self.bar is None:
            return ""
        met = value <= self.bar if self.at_least is None else value >= self.bar
        return "yes" if met else "no"


def goals_table(goals: Sequence[Goal], jobs: Mapping[str, Jobs]) -> list[str]:
    """The table of the goals, with measured values and verdicts, and the remarks below it.

    Args:
        goals: the goals.
        jobs: the results by recipe.
    """
    rows, remarks = [], []
    for goal in goals:
        value, shown = measured(goal, _jobs_of(goal, jobs))
        bar = "" if goal.bar is None else str(goal.bar)
        rows.append([goal.name, str(goal.published), bar, shown, goal.verdict(value)])
        if goal.remark:
            remarks += [f"- {goal.name}", *(f"  - {sentence}" for sentence in goal.remark)]
    table = markdown(["benchmark", "published", "bar", "measured", "met"], rows)
    return [*table, *([""] if remarks else []), *remarks]


def _jobs_of(goal: Goal, jobs: Mapping[str, Jobs]) -> Jobs:
    if goal.values:
        return [{"average_accuracy": value / 100} for value in goal.values]
    every = finished(jobs.get(goal.recipe, []))
    return [job for job in every if has_options(options_of(job), goal.settings)]


def measured(goal: Goal, jobs: Jobs) -> tuple[float | None, str]:
    """The value of a goal, ``None`` if there is none, and how the table shows it."""
    if not jobs:
        return None, "not run"
    if goal.decades:
        value = decades_within(jobs, 1.0)
        return value, f"{value:g} (strengths in steps of ten)"
    if goal.default is not None:
        leads = leads_over(jobs, goal.default)
        if not leads:
            return None, "not run"
        best = max(leads.values(), key=statistics.fmean)
        shown = (
            f"{mean_and_error(best)} under the best of {len(leads)} strengths "
            f"({min(leads):g} to {max(leads):g}, {_number_of_seeds(best)})"
        )
        # If the default is the smallest or largest strength, the best may lie beyond.
        inside = min(leads) < goal.default < max(leads)
        return statistics.fmean(best) if inside else None, shown
    value = statistics.fmean(100 * job["average_accuracy"] for job in jobs)
    return value, f"{value:.2f} ({_number_of_seeds(jobs)})"


def _number_of_seeds(of: Sequence[Any]) -> str:
    return f"{len(of)} seed{'s' * (len(of) > 1)}"


def leads_over(jobs: Jobs, default: float) -> dict[float, list[float]]:
    """The points of every strength over a default one, on each seed that both have."""
    by_strength: dict[float, dict[int, float]] = {}
    for job in jobs:
        by_strength.setdefault(strength_of(job), {})[job["seed"]] = 100 * job["average_accuracy"]
    reference = by_strength.get(default, {})
    return {
        strength: [by_seed[seed] - reference[seed] for seed in common]
        for strength, by_seed in sorted(by_strength.items())
        if (common := sorted(by_seed.keys() & reference.keys()))
    }


def decades_within(jobs: Jobs, points: float) -> float:
    """The longest run of strengths, in decades, whose mean is within ``points`` of the best.

    A strength without result, a factor of more than ten from its neighbours, ends a run.
    """
    means = means_by_strength(jobs)
    best = max(means.values())
    longest, first, last = 0.0, 0.0, 0.0
    for strength, mean in means.items():
        if mean < best - points:
            last = 0.0
            continue
        if strength > 10.001 * last:
            first = strength
        last = strength
        longest = max(longest, math.log10(strength / first))
    return round(longest, 1)
