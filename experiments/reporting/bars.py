"""The goals of the project, and whether the kept results reach them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.tables import (
    Jobs,
    finished,
    has_options,
    markdown,
    mean_and_error,
    means_by_strength,
    options_of,
    strength_of,
)


def bars_table(bars: Sequence[Mapping[str, Any]], jobs: Mapping[str, Jobs]) -> list[str]:
    """The table of the bars, with measured values and verdicts, and the remarks below it.

    A bar's value is the mean accuracy, which must be at least the bar.  With ``decades: true`` it
    is the decades of strength within a point of the best, at least the bar.  With ``default`` it is
    the points by which this strength is under the best one, at most the bar.  Strengths are
    compared on the seeds that both have.  There is no verdict if the default is the smallest or
    largest strength.  A bar without a recipe has ``values``, the accuracies in percent that a
    command of its remark printed.

    Args:
        bars: the bars, each with ``name``, ``published``, ``bar``, ``recipe``, the ``settings`` of
            the jobs that count and, optionally, a ``remark``, a list of sentences.  Without a
            ``bar`` the value is only shown.
        jobs: the results by recipe.
    """
    rows = []
    for bar in bars:
        value, shown = measured(bar, _members(bar, jobs))
        verdict = ""
        if value is not None and "bar" in bar:
            met = value <= bar["bar"] if "default" in bar else value >= bar["bar"]
            verdict = "yes" if met else "no"
        published, limit = str(bar.get("published", "")), str(bar.get("bar", ""))
        rows.append([bar["name"], published, limit, shown, verdict])
    remarks = []
    for bar in bars:
        if "remark" in bar:
            remarks += [f"- {bar['name']}", *(f"  - {sentence}" for sentence in bar["remark"])]
    table = markdown(["benchmark", "published", "bar", "measured", "met"], rows)
    return [*table, *([""] if remarks else []), *remarks]


def _members(bar: Mapping[str, Any], jobs: Mapping[str, Jobs]) -> Jobs:
    if "values" in bar:
        return [{"average_accuracy": value / 100} for value in bar["values"]]
    every = finished(jobs.get(bar["recipe"], []))
    return [job for job in every if has_options(options_of(job), bar["settings"])]


def measured(bar: Mapping[str, Any], jobs: Jobs) -> tuple[float | None, str]:
    """The value of a bar, ``None`` if there is none, and how the table shows it."""
    if not jobs:
        return None, "not run"
    if bar.get("decades"):
        value = decades_within(jobs, 1.0)
        return value, f"{value:g} (strengths in steps of ten)"
    if "default" in bar:
        leads = leads_over(jobs, bar["default"])
        if not leads:
            return None, "not run"
        best = max(leads.values(), key=statistics.fmean)
        shown = (
            f"{mean_and_error(best)} under the best of {len(leads)} strengths "
            f"({min(leads):g} to {max(leads):g}, {_number_of_seeds(best)})"
        )
        # If the default is the smallest or largest strength, the best may lie beyond.
        inside = min(leads) < bar["default"] < max(leads)
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
