"""Tables over the jobs of a sweep: one row per setting, over its seeds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

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
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = defaultdict(list)
    for job in jobs:
        key = tuple(pair for pair in options_of(job).items() if pair[0] != "seed")
        groups[key].append(job)
    names = list(dict.fromkeys(name for key in groups for name, _ in key))
    varied = [n for n in names if n in shown or len({dict(key).get(n) for key in groups}) > 1]
    varied = varied or names[:1]
    rows = []
    for key, members in groups.items():
        values = dict(key)
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
                *(as_written(values.get(name, "")) for name in varied),
                seeds_of(members),
                accuracy,
                drop,
                total,
                *([_published(values, published)] if published else []),
            ]
        )
    columns = [*varied, "seeds", "average accuracy", "forgetting", "seconds"]
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


def options_of(job: Mapping[str, Any]) -> dict[str, str]:
    """The options of a job on the command line, by name."""
    pairs = (override.lstrip("+~").partition("=") for override in job["overrides"])
    return {name: value for name, _, value in pairs}


def has_options(options: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    """Whether all ``wanted`` are among the options; ``1e-3`` is ``0.001``, as for Hydra."""
    return all(
        name in options and _value(options[name]) == _value(str(value))
        for name, value in wanted.items()
    )


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def as_written(text: str) -> str:
    """A value as a person writes it: 1e+11, not 100000000000.0."""
    value = _value(text)
    return f"{value:g}" if isinstance(value, float) else value


def seeds_of(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The jobs' seeds, three or more in a row as ``first to last``."""
    seeds = sorted({int(job["seed"]) for job in jobs})
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _published(values: Mapping[str, str], published: Mapping[str, str]) -> str:
    """The figure whose settings are all among a row's."""
    for setting, figure in published.items():
        if has_options(values, dict(pair.split("=", 1) for pair in setting.split(","))):
            return str(figure)
    return ""
