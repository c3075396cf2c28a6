"""The pictures of the report on one benchmark.  A picture without data is left out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.recording.metrics import average_accuracies
from experiments.reporting.drawing import draw_accuracies, draw_band, legend_below
from experiments.reporting.report.measures import Estimate, Ranking, Row
from experiments.reporting.report.svg import INK, MUTED, SERIES, Picture
from experiments.reporting.tables import accuracies_by_strength, strength_of

MOST_DRAWN = 10
"""The largest number of settings in a picture, as there are colours."""

MOST_SPECTRA = 3
"""The largest number of settings whose Fisher spectra are drawn."""

WIDTH = 4.4
"""The width of a picture in inches, so that its letters are legible on a phone."""


def pictures_of(ranking: Ranking, prefix: str) -> list[Picture]:
    """The pictures on one benchmark.

    Args:
        ranking: the settings and their measures.
        prefix: what the names of the files begin with.
    """
    done = [row for row in ranking.rows if row.accuracy]
    if not done:
        return []
    shown = _drawn(done)
    styles = _styles(shown)
    pictures = [
        _over_tasks(shown, styles),
        _trade(shown, ranking.reference),
        _over_strength(done),
        *(_matrix(row, place) for place, row in enumerate(shown)),
        *(_spectra(row, place) for place, row in enumerate(_with_spectra(shown)[:MOST_SPECTRA])),
        _overlap(shown, styles),
        _seconds(shown),
        _memory(shown),
    ]
    present = [picture for picture in pictures if picture]
    for picture in present:
        picture.name = f"{prefix}_{picture.name}"
    return present


def left_out(ranking: Ranking) -> int:
    """The number of settings that are in the table and not in the pictures."""
    done = [row for row in ranking.rows if row.accuracy]
    return len(done) - len(_drawn(done))


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """The best settings, the references always among them, in their order."""
    references = [row for row in rows if row.setting.reference][: MOST_DRAWN // 2]
    others = [row for row in rows if row not in references][: MOST_DRAWN - len(references)]
    return [row for row in rows if row in references or row in others]


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The look of every setting's curve: colours for methods, dashes for references."""
    styles: dict[str, dict[str, Any]] = {}
    colours = iter(SERIES)
    for row in rows:
        style: dict[str, Any]
        if row.setting.reference == "joint":
            style = {"color": INK, "ls": (0, (4, 2)), "marker": ""}
        elif row.setting.reference == "naive":
            style = {"color": MUTED, "ls": (0, (1, 1.5)), "marker": ""}
        else:
            style = {"color": next(colours), "ls": "-", "marker": "o", "markersize": 3.5}
        styles[row.setting.name] = {**style, "label": row.setting.name}
    return styles


def _over_tasks(rows: Sequence[Row], styles: Mapping[str, dict[str, Any]]) -> Picture:
    figure, axes = _axes("tasks seen", "average accuracy in %", len(rows))
    text = "Average test accuracy over the tasks seen so far; bands are standard errors over seeds."
    picture = Picture("accuracy_over_tasks", "Accuracy against tasks seen", text, figure)
    for row in rows:
        runs = [average_accuracies(job["accuracy_matrix"]) for job in row.setting.jobs]
        means = [_estimate([100 * v for v in values]) for values in zip(*runs, strict=True)]
        steps = list(range(1, len(means) + 1))
        look = styles[row.setting.name]
        _curve(picture, axes, xs=steps, estimates=means, style=look, words="task {:g}: {} %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(picture)


def _trade(rows: Sequence[Row], reference: str) -> Picture:
    """What each setting costs: forgetting, intransigence, and what it gains before training."""
    figure, axes = _bars(rows, "points", height=0.42)
    text = "Forgetting: lost on old tasks since their best."
    if any(row.intransigence for row in rows):
        text += f" Intransigence: what the method costs new tasks, against {reference}."
    if any(row.forward_transfer for row in rows):
        text += " Forward transfer: gained on tasks before they are learnt."
    picture = Picture("forgetting", "What is lost, and what new tasks cost", text, figure)
    measures = (
        ("forgetting", "o", SERIES[1]),
        ("intransigence", "s", SERIES[0]),
        ("forward transfer", "^", SERIES[2]),
    )
    columns = {
        name: [getattr(row, name.replace(" ", "_")) for row in rows] for name, *_ in measures
    }
    present = [measure for measure in measures if any(columns[measure[0]])]
    for number, (name, marker, colour) in enumerate(present):
        estimates = columns[name]
        label: str | None = name
        for place, (row, estimate) in enumerate(zip(rows, estimates, strict=True)):
            if estimate is None:
                continue
            y = place + 0.2 * (number - (len(present) - 1) / 2)
            drawn = axes.errorbar(
                estimate.mean, y, xerr=estimate.error or 0.0, fmt=marker, color=colour,
                markersize=5, elinewidth=1.2, capsize=0, label=label,
            )  # fmt: skip
            picture.hover(drawn.lines[0], f"{row.setting.name}: {name} {estimate.text()} points")
            label = None
    axes.axvline(0, color=MUTED, lw=0.8)
    return _finished(picture)


def _over_strength(rows: Sequence[Row]) -> Picture | None:
    """The accuracy against the strength, a curve for settings that differ in nothing else."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for job in row.setting.jobs:
            if job["config"].get("strategy", {}).get("strength"):
                curves.setdefault(_without_strength(row.setting.name), []).append(job)
    varied = {name: jobs for name, jobs in curves.items() if len(set(map(strength_of, jobs))) > 1}
    if not varied:
        return None
    figure, axes = _axes("strength (1 is the Bayes value)", "average accuracy in %", len(varied))
    text = "Bands are standard errors over seeds."
    picture = Picture("strength", "Accuracy against the strength", text, figure)
    for colour, (name, jobs) in zip(SERIES, varied.items(), strict=False):
        by_strength = accuracies_by_strength(jobs)
        means = [_estimate(values) for values in by_strength.values()]
        style = {"color": colour, "marker": "o", "markersize": 3.5, "label": name}
        _curve(
            picture, axes, xs=list(by_strength), estimates=means, style=style,
            words="strength {:g}: {} %",
        )  # fmt: skip
    axes.set_xscale("log")
    return _finished(picture)


def _without_strength(name: str) -> str:
    return ", ".join(part for part in name.split(", ") if not part.startswith("strength "))


def _matrix(row: Row, place: int) -> Picture:
    """The accuracies of a setting after each task on each task, the mean over its seeds."""
    jobs = row.setting.jobs
    matrices = [job["accuracy_matrix"] for job in jobs]
    mean = [
        [statistics.fmean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]
    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    draw_accuracies(axes, mean, fontsize=7.5 if len(mean) > 6 else None)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    seeds = f"mean over {len(jobs)} seeds" if len(jobs) > 1 else "one seed"
    return Picture(f"matrix_{place + 1}", row.setting.name, f"Test accuracy in %, {seeds}.", figure)


def _with_spectra(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(_layers(job) for job in row.setting.jobs)]


def _layers(job: Mapping[str, Any], task: int = -1) -> dict[str, Any]:
    """The layers of a run with a Fisher spectrum after a task."""
    tasks = job.get("fisher") or [{"layers": {}}]
    return {name: layer for name, layer in tasks[task]["layers"].items() if layer["eigenvalues"]}


def _spectra(row: Row, place: int) -> Picture:
    """The Fisher eigenvalues by layer, of the first and of the last task."""
    jobs = [job for job in row.setting.jobs if _layers(job)]
    names = list(_layers(jobs[0]))
    figure, axes = _axes("rank", "eigenvalue", len(names))
    text = "Eigenvalues of the Fisher matrix by layer: line after the last task, dots after task 1."
    title = f"Fisher spectra: {row.setting.name}"
    picture = Picture(f"spectra_{place + 1}", title, text, figure)
    for number, name in enumerate(names):
        colour = SERIES[number % len(SERIES)]
        for task in (-1, 0):
            spectra = [layers[name] for job in jobs if name in (layers := _layers(job, task))]
            if not spectra:
                continue
            ranks = spectra[0]["ranks"]
            values = [each["eigenvalues"] for each in spectra if each["ranks"] == ranks]
            means = [statistics.fmean(at_rank) for at_rank in zip(*values, strict=True)]
            points = [(r, m) for r, m in zip(ranks, means, strict=True) if m > 0]
            if not points:
                continue
            (line,) = axes.plot(*zip(*points, strict=True), color=colour, ls="-" if task else ":")
            if f"layer {name}" not in axes.get_legend_handles_labels()[1]:
                line.set_label(f"layer {name}")
            which = "the last task" if task else "task 1"
            picture.hover(line, f"layer {name}, {which}: largest {means[0]:.2g}")
    axes.set(xscale="log", yscale="log")
    return _finished(picture)


def _overlap(rows: Sequence[Row], styles: Mapping[str, dict[str, Any]]) -> Picture | None:
    """The overlap of the last task's Fisher information with the first's, by layer."""
    overlaps = {
        row.setting.name: runs
        for row in rows
        if (runs := [job["fisher_overlap"][-1] for job in row.setting.jobs if _overlaps(job)])
    }
    if not overlaps:
        return None
    figure, axes = _axes("layer, from the input", "Fisher overlap", len(overlaps))
    text = "Last task with the first: 1 is the same parameters, 0 is different ones."
    picture = Picture("overlap", "Fisher overlap by layer", text, figure)
    for setting, runs in overlaps.items():
        layers = [name for name in runs[0] if all(name in run for run in runs)]
        means = [_estimate([run[name] for run in runs]) for name in layers]
        places = list(range(1, len(layers) + 1))
        _curve(
            picture, axes, xs=places, estimates=means, style=styles[setting],
            words="layer {:g}: {}", digits=2,
        )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(picture)


def _overlaps(job: Mapping[str, Any]) -> bool:
    return len(job.get("fisher_overlap", [])) > 1 and bool(job["fisher_overlap"][-1])


def _seconds(rows: Sequence[Row]) -> Picture:
    """The seconds of a run by what they were spent on."""
    figure, axes = _bars(rows, "seconds a run")
    picture = Picture("seconds", "Time", "Mean seconds of a run, by what they went to.", figure)
    parts = (("train", SERIES[0]), ("fisher", SERIES[1]), ("eval", SERIES[2]), ("other", MUTED))
    only_total = all(job["seconds"].keys() == {"total"} for row in rows for job in row.setting.jobs)
    starts = [0.0] * len(rows)
    for part, colour in parts:
        label: str | None = "total" if only_total else part
        for place, row in enumerate(rows):
            seconds = [job["seconds"] for job in row.setting.jobs]
            spent = [_rest(s) if part == "other" else s.get(part, 0.0) for s in seconds]
            if (width := statistics.fmean(spent)) > 0:
                (bar,) = axes.barh(
                    place, width, left=starts[place], height=0.62, color=colour, label=label
                )
                picture.hover(bar, f"{row.setting.name}: {part} {width:.1f} s")
                starts[place] += width
                label = None
    return _finished(picture)


def _rest(seconds: Mapping[str, float]) -> float:
    return max(0.0, seconds["total"] - sum(v for k, v in seconds.items() if k != "total"))


def _memory(rows: Sequence[Row]) -> Picture | None:
    """The largest memory of a run."""
    if not any(row.memory for row in rows):
        return None
    figure, axes = _bars(rows, "MB")
    text = "Largest memory of a run's process, on a GPU of its tensors."
    picture = Picture("memory", "Memory", text, figure)
    for place, row in enumerate(rows):
        if row.memory:
            (bar,) = axes.barh(place, row.memory.mean, height=0.62, color=SERIES[0])
            picture.hover(bar, f"{row.setting.name}: {row.memory.text(0)} MB")
    return _finished(picture)


def _curve(
    picture: Picture,
    axes: Axes,
    *,
    xs: Sequence[float],
    estimates: Sequence[Estimate],
    style: Mapping[str, Any],
    words: str,
    digits: int = 1,
) -> None:
    """A curve with its band; the pointer shows the numbers of each point."""
    means, errors = [e.mean for e in estimates], [e.error for e in estimates]
    draw_band(axes, xs, means, errors, **style)
    for x, estimate in zip(xs, estimates, strict=True):
        (point,) = axes.plot(x, estimate.mean, "o", color=style["color"], markersize=9, alpha=0)
        said = words.format(x, estimate.text(digits))
        picture.hover(point, f"{style['label']}, {said}")


def _estimate(values: Sequence[float]) -> Estimate:
    estimate = Estimate.of(values)
    assert estimate
    return estimate


def _axes(x: str, y: str, entries: int) -> tuple[Figure, Axes]:
    """Axes with a grid, and room for a legend of some entries."""
    figure = Figure(figsize=(WIDTH, 2.7 + 0.16 * entries), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    return figure, axes


def _bars(rows: Sequence[Row], x: str, height: float = 0.34) -> tuple[Figure, Axes]:
    """Axes with a row for each setting, the first one on top."""
    figure = Figure(figsize=(WIDTH, 1.0 + height * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = [_wrapped(row.setting.name) for row in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set(xlabel=x, ylim=(len(rows) - 0.4, -0.6))
    axes.grid(visible=True, axis="x")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _wrapped(name: str, width: int = 26) -> str:
    """A name in at most two lines, so that bars keep their room."""
    lines = [""]
    for part in name.split(", "):
        longer = f"{lines[-1]}, {part}" if lines[-1] else part
        if len(longer) > width and lines[-1]:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = longer
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1].rstrip(',')} ..."]
    return "\n".join(lines)


def _finished(picture: Picture) -> Picture:
    legend_below(picture.figure, columns=4, size=8.5)
    return picture
