"""What all pictures share: curves with error bands, heat maps of accuracies, and the legend."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.recording.metrics import Matrix

CELLS = 12
"""The largest number of tasks whose accuracies are written into a heat map."""


def draw_band(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    errors: Sequence[float | None],
    **style: Any,
) -> Any:
    """A line, and a band of its errors around it where there are any.

    Args:
        axes: where to draw.
        xs: the places.
        ys: the values there.
        errors: the standard errors of the values; ``None`` for a single one.
        style: options of :meth:`matplotlib.axes.Axes.plot`.

    Returns:
        The line.
    """
    (line,) = axes.plot(xs, ys, **style)
    known = [math.nan if error is None else error for error in errors]
    if not all(map(math.isnan, known)):
        lower = [y - error for y, error in zip(ys, known, strict=True)]
        upper = [y + error for y, error in zip(ys, known, strict=True)]
        axes.fill_between(xs, lower, upper, color=line.get_color(), alpha=0.18, lw=0)
    return line


def draw_accuracies(axes: Axes, matrix: Matrix, fontsize: float | None = None) -> None:
    """A heat map of accuracies in per cent: rows after each task, columns on each task.

    Tasks that are not learnt yet are grey.
    """
    size = len(matrix)
    learnt = [
        [100 * value if j <= i else math.nan for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
    colours = mpl.colormaps["viridis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.2))
    image = axes.imshow(learnt, vmin=0, vmax=100, cmap=colours, aspect="auto", interpolation="none")
    if size <= CELLS:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                colour = "#808080" if j > i else "#111111" if value > 0.6 else "#ffffff"
                axes.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=fontsize,
                )
    ticks = range(0, size, max(1, math.ceil(size / 10)))
    axes.set_xticks(ticks, [str(t + 1) for t in ticks])
    axes.set_yticks(ticks, [str(t + 1) for t in ticks])
    axes.set(xlabel="task (grey: not learnt yet)", ylabel="after training on task")
    assert axes.figure
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label("test accuracy in %")
    bar.outline.set_visible(False)


def legend_below(figure: Figure, columns: int = 5, size: float = 7.0) -> Figure:
    """The figure with one legend for all panels, below them, in letters of a size in points.

    A label that is wider than the figure is wrapped, and the figure grows by the lines.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return figure
    # Some 20 letters of 7 points to the inch; a handle and its spaces are as wide as 12.
    letters, beside = 140 / size * figure.get_figwidth(), 12
    labels = [textwrap.wrap(label, max(1, int(letters) - beside)) for label in handles]
    fitting = int(letters / (beside + max(len(line) for lines in labels for line in lines)))
    more = sum(len(lines) - 1 for lines in labels)
    figure.set_figheight(figure.get_figheight() + more * 1.3 * size / 72)
    legend = figure.legend(
        handles.values(),
        ["\n".join(lines) for lines in labels],
        loc="outside lower center",
        fontsize=size,
        ncols=max(1, min(fitting, columns)),
        handlelength=4,  # long enough to show dashes
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are no formulas
    return figure
