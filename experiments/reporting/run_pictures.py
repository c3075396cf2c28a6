"""The pictures of one run."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.recording.curve import CURVES, Curve
from experiments.recording.metrics import average_accuracies
from experiments.reporting.drawing import draw_accuracies
from experiments.reporting.picture_file import write_picture

NAMED = 5
"""The largest number of tasks that are all named in a legend; of more, the first and the last."""


def draw_accuracy_matrix(matrix: Sequence[Sequence[float]], title: str, path: Path) -> None:
    """A heat map of the accuracies: rows after each task, columns on each task."""
    size = len(matrix)
    figure = Figure(figsize=(max(4.5, 0.55 * size + 2), max(3.8, 0.5 * size + 1.6)))
    axes = figure.add_subplot()
    draw_accuracies(axes, matrix)
    axes.set_title(title)
    figure.tight_layout()
    write_picture(figure, path, dpi=120)


def draw_learning_curves(
    matrix: Sequence[Sequence[float]], curve: Curve, title: str, path: Path
) -> None:
    """Accuracy on every task after each, and loss and penalty over the training steps."""
    size = len(matrix)
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    for task in range(size):
        after = range(task + 1, size + 1)
        tint = colormaps["viridis"](task / max(1, size - 1) * 0.9)
        named = f"task {task + 1}" if task in (0, size - 1) or size <= NAMED else None
        accuracies = [100 * matrix[i - 1][task] for i in after]
        left.plot(after, accuracies, marker=".", lw=1, color=tint, label=named)
    mean = [100 * accuracy for accuracy in average_accuracies(matrix)]
    left.plot(range(1, size + 1), mean, color="black", lw=2.5, label="mean so far")
    left.set(xlabel="tasks learnt", ylabel="test accuracy in %", title=title)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize="small", ncols=2)
    left.grid(alpha=0.3)
    steps = [point.step for point in curve.points]
    for name, colour in zip(CURVES, ("tab:blue", "tab:red"), strict=True):
        ys = [point.means[name] for point in curve.points]
        if any(y > 0 for y in ys):
            label = name.removeprefix("train/")
            label += " (part of the loss)" if label == "penalty" else ""
            positive = [y if y > 0 else math.nan for y in ys]
            right.plot(steps, positive, color=colour, lw=1, label=label)
    right.set(xlabel="training step", ylabel="nats per example", yscale="log", title="training")
    for number, start in enumerate(curve.starts):
        named = None if number else "a new task begins"
        right.axvline(start, color="black", lw=0.8, ls=":", alpha=0.6, label=named)
    if right.lines:
        right.legend(fontsize="small")
    right.grid(alpha=0.3)
    figure.tight_layout()
    write_picture(figure, path, dpi=120)
