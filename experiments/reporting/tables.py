"""Tables over the jobs of a sweep: one row per setting, over its seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.options import as_written, by_setting, has_options, options_of, varied

Jobs = Sequence[Mapping[str, Any]]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def sweep_table(
    jobs: Sequence[Mapping[str, Any]],
    published: Mapping[str, str] | None = None,
    shown: Sequence[str] = (),
) -> tuple[list[str], list[list[str]]]:
    """One row per swept setting, over its seeds.

    Args:
        jobs: the results of the jobs; diverged ones are counted beside the accuracy.
        published: see :class:`SweepReport`.
        shown: options with a column even if all jobs have the same value.

    Returns:
        The names of the columns and the rows, as text.
    """
    settings = by_setting(jobs, map(options_of, jobs))
    names = list(dict.fromkeys(name for options, _ in settings for name in options))
    differing = varied([options for options, _ in settings])
    named = [name for name in names if name in shown or name in differing] or names[:1]
    rows = []
    for options, members in settings:
        done = finished(members)
        accuracy, drop = (
            mean_and_error([100 * job[name] for job in done])
            for name in ("average_accuracy", "forgetting")
        )
        if failed := len(members) - len(done):
            accuracy = f"{accuracy} ({failed} diverged)" if done else "diverged"
        total = f"{statistics.fmean(j['seconds']['total'] for j in done):.1f}" if done else ""
        rows.append(
            [
                *(as_written(options.get(name, "")) for name in named),
                seeds_of(members),
                accuracy,
                drop,
                total,
                *([_published(options, published)] if published else []),
            ]
        )
    columns = [*named, "seeds", "average accuracy", "forgetting", "seconds"]
    return columns + ["published"] * bool(published), rows


def finished(jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The jobs that did not diverge."""
    return [job for job in jobs if "diverged" not in job]


def mean_and_error(values: Sequence[float]) -> str:
    """The mean ± its standard error; one value alone, and an empty text for none."""
    if not values:
        return ""
    mean, error = statistics.fmean(values), standard_error(values)
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of some values, ``None`` for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def means_by_strength(jobs: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """The mean accuracy in per cent at every strength, the smallest strength first."""
    return {s: statistics.fmean(values) for s, values in accuracies_by_strength(jobs).items()}


def accuracies_by_strength(jobs: Sequence[Mapping[str, Any]]) -> dict[float, list[float]]:
    """The accuracies of all seeds in per cent at every strength, the smallest strength first."""
    accuracies: dict[float, list[float]] = {}
    for job in jobs:
        accuracies.setdefault(strength_of(job), []).append(100 * job["average_accuracy"])
    return dict(sorted(accuracies.items()))


def strength_of(job: Mapping[str, Any]) -> float:
    """The strength that a job ran with."""
    return float(job["config"]["strategy"]["strength"])


def seeds_of(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The jobs' seeds, three or more in a row as ``first to last``."""
    seeds = sorted({int(job["seed"]) for job in jobs})
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def versions_of(jobs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The versions of each package that the jobs ran with."""
    versions: dict[str, dict[str, None]] = {}
    for job in jobs:
        for name, version in job.get("versions", {}).items():
            versions.setdefault(name, {})[version] = None
    return {name: " and ".join(different) for name, different in versions.items()}


def _published(options: Mapping[str, str], published: Mapping[str, str]) -> str:
    """The figure whose settings are all among a row's."""
    for setting, figure in published.items():
        if has_options(options, dict(pair.split("=", 1) for pair in setting.split(","))):
            return str(figure)
    return ""
