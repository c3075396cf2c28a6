"""The pictures of one run."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.recording.curve import CURVES, Curve
from experiments.recording.metrics import average_accuracies
from experiments.reporting.drawing import draw_accuracies
from experiments.reporting.picture_file import write_picture


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
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    for task in range(size):
        after = range(task + 1, size + 1)
        left.plot(after, [100 * matrix[i - 1][task] for i in after], marker=".", lw=1, alpha=0.6)
    mean = [100 * accuracy for accuracy in average_accuracies(matrix)]
    left.plot(range(1, size + 1), mean, color="black", lw=2.5, label="mean over tasks so far")
    left.set(xlabel="tasks learnt", ylabel="test accuracy in %", title=title)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
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
    if right.lines:
        right.legend()
    right.grid(alpha=0.3)
    figure.tight_layout()
    write_picture(figure, path, dpi=120)
