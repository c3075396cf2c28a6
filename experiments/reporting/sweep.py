"""What a run and a sweep leave: results and tables."""

import logging
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.reporting.folder import DamagedResultsError, only_warned, read_results, write_whole

_log = logging.getLogger(__name__)

FAILURES = "failed.txt"
"""In a sweep's folder: its jobs that failed, one a line."""

NEAR_CHANCE = 10.0
"""Points within which a class-incremental run ends where fine-tuning does."""


# --- one run ------------------------------------------------------------------------------


def accuracy_table(matrix: Sequence[Sequence[float]]) -> tuple[list[str], list[list[Any]]]:
    """A row a task, in per cent: accuracy when just learnt, at the end, and the difference."""
    columns = ["task", "just learnt", "at the end", "change"]
    rows: list[list[Any]] = []
    for task in range(len(matrix)):
        learnt, final = 100 * matrix[task][task], 100 * matrix[-1][task]
        rows.append([str(task + 1), round(learnt, 2), round(final, 2), round(final - learnt, 2)])
    return columns, rows


def show_results(results: Mapping[str, Any], title: str, scenario: str, console: Console) -> None:
    """Print the table of accuracies, and what to expect where that surprises."""
    columns, rows = accuracy_table(results["accuracy_matrix"])
    table = Table(title=f"{title}: test accuracy in %")
    for column in columns:
        table.add_column(column, justify="right")
    for task, *values in rows:
        table.add_row(task, *(f"{value:.2f}" for value in values))
    table.add_section()
    matrix = results["accuracy_matrix"]
    learnt = 100 * statistics.fmean(matrix[i][i] for i in range(len(matrix)))
    final = 100 * results["average_accuracy"]
    table.add_row("mean", f"{learnt:.2f}", f"{final:.2f}", f"{final - learnt:.2f}")
    console.print(table)
    if scenario == "class" and len(matrix) > 1 and final < 100 / len(matrix) + NEAR_CHANCE:
        console.print(
            f"Class-incremental: a network that is only fine-tuned ends near "
            f"{100 / len(matrix):.0f} % (perfect on the last task, 0 on all others), and "
            "methods that only protect weights, EWC among them, are published within a few "
            "points of that (split MNIST: 20 %). It is no fault of the run."
        )


# --- a sweep ------------------------------------------------------------------------------


class SweepReport(Callback):
    """When a sweep has ended: ``report.md`` over its jobs, also printed.

    Args:
        published: accuracies in per cent that were published for some rows, by the row's
            settings as on the command line: ``strategy=ewc`` or
            ``benchmark.scenario=task,strategy=ewc``.
        pictures: for RESULTS.md, names of functions in :mod:`experiments.reporting.pictures`.
    """

    def __init__(
        self, published: Mapping[str, str] | None = None, pictures: Sequence[str] = ()
    ) -> None:
        self.published = dict(published or {})
        self.pictures = list(pictures)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Forget the failures of a sweep before into the same folder: its jobs run again."""
        (Path(config.hydra.sweep.dir) / FAILURES).unlink(missing_ok=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Put together what the jobs left.

        Raises:
            SystemExit: a job has failed.
        """
        folder = Path(config.hydra.sweep.dir)
        with only_warned("report.md"):
            report_sweep(folder, self.published)
        if failed := failures(folder):
            count = f"{len(failed)} job{'s' * (len(failed) > 1)}"
            more = f"; and {len(failed) - 3} more, in {folder / FAILURES}"
            named = "; ".join(failed[:3]) + more * (len(failed) > 3)
            sys.exit(f"error: {count} of the sweep failed: {named}")


def note_failure(folder: Path, job: str, reason: str) -> None:
    """Note in a sweep's folder that a job failed: processes of all kinds can read it there."""
    with (folder / FAILURES).open("a", encoding="utf-8") as file:
        file.write(f"{job}: {reason}\n")


def failures(folder: Path) -> list[str]:
    """The jobs of a sweep that failed the last time it ran, each with the reason."""
    path = folder / FAILURES
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def report_sweep(folder: Path, published: Mapping[str, str] | None = None) -> int:
    """Write ``report.md`` over the finished jobs of a sweep, and print it.

    Args:
        folder: of the sweep.
        published: see :class:`SweepReport`.

    Returns:
        The number of jobs; nothing is written over none.
    """
    jobs, damaged = _read(folder)
    if not jobs:
        return 0
    columns, rows = sweep_table(jobs, published)
    text = "Accuracy and forgetting in %, mean ± standard error over the jobs of a row."
    lines = [text, "", *markdown(columns, rows), ""]
    if failed := failures(folder):
        lines += ["Without results, as they failed:", "", *(f"- {job}" for job in failed), ""]
    if damaged:
        lines += ["Left out:", "", *(f"- {job}" for job in damaged), ""]
    write_whole(folder / "report.md", "\n".join(lines))
    table = Table(title=f"{len(jobs)} jobs: {os.path.relpath(folder)}")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return len(jobs)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """What every job of a sweep that has ended wrote, in the order of the jobs.

    Damaged results are named in a warning and left out.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of a sweep's jobs, and what is wrong with those that are damaged."""
    folders = sorted(
        (path.parent for path in folder.glob("*/results.json")), key=lambda f: (len(f.name), f)
    )
    jobs, damaged = [], []
    for job in folders:
        try:
            if results := read_results(job):
                jobs.append(results)
        except DamagedResultsError as error:
            _log.warning("%s It is left out.", error)
            damaged.append(str(error))
    return jobs, damaged


def finished(jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The jobs that have results; the others diverged."""
    return [job for job in jobs if "diverged" not in job]


def sweep_table(
    jobs: Sequence[Mapping[str, Any]],
    published: Mapping[str, str] | None = None,
    shown: Sequence[str] = (),
) -> tuple[list[str], list[list[str]]]:
    """A row for each setting that was swept, over its seeds.

    Args:
        jobs: what the jobs wrote; those that diverged are counted beside the accuracy.
        published: see :class:`SweepReport`.
        shown: options that have a column although all jobs have the same.

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
                *(_shown(values.get(name, "")) for name in varied),
                _seeds(members),
                accuracy,
                drop,
                total,
                *([_published(values, published)] if published else []),
            ]
        )
    columns = [*varied, "seeds", "average accuracy", "forgetting", "seconds"]
    return columns + ["published"] * bool(published), rows


def means_by_strength(jobs: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """The mean accuracy in per cent at every strength, the smallest strength first."""
    found: dict[float, list[float]] = {}
    for job in jobs:
        found.setdefault(strength_of(job), []).append(100 * job["average_accuracy"])
    return {strength: statistics.fmean(found[strength]) for strength in sorted(found)}


def strength_of(job: Mapping[str, Any]) -> float:
    """The strength that a job ran with."""
    return float(job["config"]["strategy"]["strength"])


def options_of(job: Mapping[str, Any]) -> dict[str, str]:
    """The options that a job was given on the command line, by name."""
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


def _shown(text: str) -> str:
    """A value as a person writes it: 1e+11, not 100000000000.0."""
    value = _value(text)
    return f"{value:g}" if isinstance(value, float) else value


def _seeds(jobs: Sequence[Mapping[str, Any]]) -> str:
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


def mean_and_error(values: Sequence[float]) -> str:
    """The mean ± its standard error, of one value without; nothing of none."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
