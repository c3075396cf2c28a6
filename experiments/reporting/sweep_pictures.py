"""Pictures over the jobs of a recipe for RESULTS.md; a recipe names those that it needs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.recording.metrics import average_accuracies
from experiments.reporting.drawing import draw_band, legend_below
from experiments.reporting.options import by_setting, options_of, varied
from experiments.reporting.tables import Jobs, accuracies_by_strength, standard_error

LINES = ("-", "--", ":")
"""Ten settings, as many as there are colours, have one kind of line."""

SPEAKING = ("strategy", "fisher/estimator", "fisher/structure")
"""Options whose values stand without the option's name in a legend."""


def over_tasks(jobs: Jobs, title: str) -> Figure:
    """Average accuracy over the tasks so far: one panel per scenario, one line per setting."""
    scenarios = list(dict.fromkeys(_scenario(job) for job in jobs))
    width = 8 if len(scenarios) == 1 else 4 * len(scenarios)
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    panels = figure.subplots(1, len(scenarios), squeeze=False)[0]
    settings = _labelled(jobs, but=("benchmark.scenario",))
    for axes, scenario in zip(panels, scenarios, strict=True):
        for place, (label, members) in enumerate(settings):
            in_scenario = [job for job in members if _scenario(job) == scenario]
            runs = [average_accuracies(job["accuracy_matrix"]) for job in in_scenario]
            if not runs:
                continue
            mean, errors = _means(runs)
            steps = range(1, len(mean) + 1)
            style = {"marker": ".", "label": label, "color": f"C{place % 10}"}
            style["ls"] = LINES[place // 10 % len(LINES)]
            draw_band(axes, steps, mean, errors, **style)
        axes.set(xlabel="tasks learnt", title=scenario or title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("average accuracy in %")
    if len(scenarios) > 1:
        figure.suptitle(title)
    return legend_below(figure)


def over_single_tasks(jobs: Jobs, title: str) -> Figure:
    """The accuracy on each task from when it was learnt, one panel per task."""
    settings = _labelled(jobs)
    size = len(jobs[0]["accuracy_matrix"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, size, sharey=True, squeeze=False)[0]
    for task, axes in enumerate(panels):
        for label, members in settings:
            columns = [[row[task] for row in job["accuracy_matrix"][task:]] for job in members]
            mean, errors = _means(columns)
            draw_band(axes, range(task + 1, size + 1), mean, errors, marker="o", label=label)
        axes.set(xlabel="tasks learnt", title=f"task {task + 1}", xlim=(0.8, size + 0.2))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy in %")
    figure.suptitle(title)
    return legend_below(figure)


def over_strength(jobs: Jobs, title: str) -> Figure:
    """Average accuracy against the strength, one line per other setting."""
    figure, axes = _axes(title, "strength (1 is the Bayes value)", "average accuracy in %")
    for label, members in _labelled(jobs, but=("strategy.strength",)):
        runs = accuracies_by_strength(members)
        means = [statistics.fmean(values) for values in runs.values()]
        errors = [standard_error(values) for values in runs.values()]
        draw_band(axes, list(runs), means, errors, marker=".", label=label)
    axes.set_xscale("log")
    return legend_below(figure)


def overlap_by_layer(jobs: Jobs, title: str) -> Figure:
    """The overlap of the last task's Fisher information with the first's, per layer."""
    figure, axes = _axes(title, "layer, from the input", "Fisher overlap of the two tasks")
    for label, members in _labelled(jobs):
        runs = [job["fisher_overlap"][-1] for job in members]
        # A layer that has no information in one run has no overlap there.
        names = [name for name in runs[0] if all(name in run for run in runs)]
        layers = [[run[name] for run in runs] for name in names]
        means = [statistics.fmean(values) for values in layers]
        errors = [standard_error(values) or 0.0 for values in layers]
        axes.errorbar(range(1, len(means) + 1), means, errors, marker="o", capsize=3, label=label)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return legend_below(figure)


OF_SWEEPS = {
    f.__name__: f for f in (over_tasks, over_single_tasks, over_strength, overlap_by_layer)
}
"""The pictures that a recipe may ask for, by name."""


def _labelled(jobs: Jobs, but: Sequence[str] = ()) -> list[tuple[str, Jobs]]:
    """The jobs by setting, each under its varied options as on the command line."""
    settings = by_setting(jobs, map(options_of, jobs), but)
    names = varied([options for options, _ in settings])
    labels = (
        ", ".join(
            value if name in SPEAKING else f"{name}={value}"
            for name, value in options.items()
            if name in names
        )
        for options, _ in settings
    )
    return [(label or "all seeds", of) for label, (_, of) in zip(labels, settings, strict=True)]


def _scenario(job: Mapping[str, Any]) -> str:
    return options_of(job).get("benchmark.scenario", "")


def _means(runs: Sequence[Sequence[float]]) -> tuple[list[float], list[float | None]]:
    """The means and the standard errors over runs, in per cent, at each place."""
    places = [[100 * value for value in values] for values in zip(*runs, strict=True)]
    return [statistics.fmean(v) for v in places], [standard_error(v) for v in places]


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes
