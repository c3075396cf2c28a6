"""What the report says of a setting in numbers, each a mean over its seeds."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from experiments.recording.metrics import forward_transfer, intransigence
from experiments.reporting.report.settings import (
    REFERENCES,
    Benchmark,
    Setting,
    circumstances,
    strategy_of,
)
from experiments.reporting.tables import standard_error

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        error: its standard error, ``None`` for one value.
        count: the number of values.
    """

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """The estimate from some values; ``None`` from none."""
        return (
            cls(statistics.fmean(values), standard_error(values), len(values)) if values else None
        )

    def text(self, digits: int = 1) -> str:
        """The mean ± its standard error."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        mean = round(self.mean, digits) + 0.0  # not -0.0
        return f"{mean:.{digits}f}{error}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Row:
    """A setting and its measures: accuracies in per cent, differences of them in points.

    What its runs do not have is ``None``.

    Attributes:
        setting: the setting.
        accuracy: the average accuracy over all tasks at the end.
        forgetting: see :func:`experiments.recording.metrics.forgetting`.
        intransigence: see :func:`experiments.recording.metrics.intransigence`.
        forward_transfer: see :func:`experiments.recording.metrics.forward_transfer`.
        seconds: the seconds of a run in total.
        memory: the largest memory of a run in MB.
    """

    setting: Setting
    accuracy: Estimate | None
    forgetting: Estimate | None
    intransigence: Estimate | None
    forward_transfer: Estimate | None
    seconds: Estimate | None
    memory: Estimate | None


@dataclass(frozen=True)
class Ranking:
    """The settings on a benchmark, the best first.

    Attributes:
        name: the benchmark.
        rows: the settings with their measures.
        reference: the strategy that intransigence is measured against; empty without any.
        matrices: the accuracies of the reference, by the circumstances of its runs.
    """

    name: str
    rows: list[Row]
    reference: str
    matrices: Mapping[str, Sequence[Sequence[float]]]


def ranked(benchmark: Benchmark) -> Ranking:
    """The settings of a benchmark with their measures, the best accuracy first."""
    jobs = [job for setting in benchmark.settings for job in setting.jobs]
    present = {strategy_of(job) for job in jobs}
    reference = next((name for name in REFERENCES if name in present), "")
    matrices = {
        circumstances(job): job["accuracy_matrix"]
        for job in jobs
        if reference and strategy_of(job) == reference
    }
    rows = [_row(setting, reference, matrices) for setting in benchmark.settings]
    rows.sort(key=lambda row: -row.accuracy.mean if row.accuracy else 1.0)
    return Ranking(benchmark.name, rows, reference, matrices)


def cost_to_new_tasks(
    job: Results, matrices: Mapping[str, Sequence[Sequence[float]]]
) -> float | None:
    """The intransigence of a run; ``None`` where no reference ran under the same circumstances."""
    reference = matrices.get(circumstances(job))
    return None if reference is None else intransigence(job["accuracy_matrix"], reference)


def gain_before_training(job: Results) -> float | None:
    """The forward transfer of a run; ``None`` where the untrained network was not measured."""
    initial = job.get("initial_accuracies")
    return forward_transfer(job["accuracy_matrix"], initial) if initial else None


def _row(
    setting: Setting, reference: str, matrices: Mapping[str, Sequence[Sequence[float]]]
) -> Row:
    jobs = setting.jobs

    def measured(measure: Callable[[Results], float | None], scale: float) -> Estimate | None:
        return Estimate.of(_numbers((measure(job) for job in jobs), scale))

    return Row(
        setting,
        measured(lambda job: job["average_accuracy"], 100),
        measured(lambda job: job["forgetting"], 100),
        None
        if setting.reference == reference
        else measured(lambda job: cost_to_new_tasks(job, matrices), 100),
        measured(gain_before_training, 100),
        measured(lambda job: job["seconds"]["total"], 1),
        measured(lambda job: job.get("memory", {}).get("peak"), 1e-6),
    )


def _numbers(values: Iterable[float | None], scale: float) -> list[float]:
    return [scale * value for value in values if value is not None]


def lead(rows: Sequence[Row], best: Row, reference: str) -> Estimate | None:
    """The points of a setting over a reference, on the circumstances that both have."""
    theirs = {
        circumstances(job): job["average_accuracy"]
        for row in rows
        if row.setting.reference == reference
        for job in row.setting.jobs
    }
    ours = ((circumstances(job), job["average_accuracy"]) for job in best.setting.jobs)
    return Estimate.of([100 * (a - theirs[where]) for where, a in ours if where in theirs])


def compared(ranking: Ranking) -> list[Row]:
    """The settings that learn the tasks one after the other, the best first; else all."""
    done = [row for row in ranking.rows if row.accuracy]
    return [row for row in done if row.setting.reference != "joint"] or done


def summary(ranking: Ranking) -> list[str]:
    """Two lines for a reader in a hurry: the best setting, and how it compares."""
    if not (rows := compared(ranking)):
        return ["No run has finished."]
    best, *others = rows
    assert best.accuracy
    seeds = f"{best.accuracy.count} seed{'s' * (best.accuracy.count > 1)}"
    name = f"Best: {best.setting.name}" if others else best.setting.name
    first = f"{name}, {best.accuracy.text()} % average accuracy ({seeds})"
    if others and (near := _indistinct(best, others[0])):
        first += f"; not clearly above {near}"
    second = []
    for reference in ("naive", "joint"):
        if best.setting.reference == reference:
            continue
        if points := lead(ranking.rows, best, reference):
            word = "over"
            if points.mean < 0:
                points, word = Estimate(-points.mean, points.error, points.count), "under"
            second.append(f"{points.text()} points {word} {reference}")
    if second:
        return [f"{first}.", f"{' and '.join(second)}, on the same seeds."]
    if others:
        assert others[0].accuracy
        behind = best.accuracy.mean - others[0].accuracy.mean
        return [f"{first}.", f"{behind:.1f} points over the next, {others[0].setting.name}."]
    return [f"{first}.", "Nothing to compare it with: run naive and joint with the same seeds."]


def _indistinct(best: Row, other: Row) -> str:
    """The other setting's name if its accuracy is within a standard error of the difference."""
    a, b = best.accuracy, other.accuracy
    if not (a and b and a.error is not None and b.error is not None):
        return ""
    error = (a.error**2 + b.error**2) ** 0.5
    return other.setting.name if a.mean - b.mean < error else ""
