"""What is made of a run's results at its end: pictures, what W&B shows, and the printed table."""

import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.recording import folder
from experiments.recording.files import only_warned
from experiments.recording.tracking import Recorder
from experiments.reporting.heat_map import heat_map
from experiments.reporting.run_pictures import draw_accuracy_matrix, draw_learning_curves


def publish(results: Mapping[str, Any], recorder: Recorder, title: str, directory: Path) -> None:
    """Draw the pictures, and show them in W&B with the tables and the final figures.

    What fails becomes a warning, as the results are saved already.

    Args:
        results: the content of ``results.json``.
        recorder: the recorder of the run, which is still open.
        title: the title of pictures and pages.
        directory: the run's folder.
    """
    matrix = results["accuracy_matrix"]
    draw = {
        "accuracy_matrix": partial(draw_accuracy_matrix, matrix, title),
        "learning_curves": partial(draw_learning_curves, matrix, recorder.curve, title),
    }
    for name in folder.PICTURES:
        path = directory / f"{name}.png"
        with only_warned(path.name):
            draw[name](path)
            recorder.picture(name, path)
    recorder.page("accuracy_heat_map", heat_map(matrix, title))
    recorder.table("accuracy", *accuracy_table(matrix))
    columns, rows = spectrum_table(results["fisher"])
    if rows:
        recorder.table("fisher_spectrum", columns, rows)
    final = ("average_accuracy", "forgetting", "backward_transfer")
    recorder.summary({key: results[key] for key in final})


def accuracy_table(matrix: Sequence[Sequence[float]]) -> tuple[list[str], list[list[Any]]]:
    """One row per task, in per cent: accuracy when just learnt, at the end, and the difference."""
    columns = ["task", "just learnt", "at the end", "change"]
    rows: list[list[Any]] = []
    for task in range(len(matrix)):
        learnt, final = 100 * matrix[task][task], 100 * matrix[-1][task]
        rows.append([str(task + 1), round(learnt, 2), round(final, 2), round(final - learnt, 2)])
    return columns, rows


def spectrum_table(
    information: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[Any]]]:
    """One row per eigenvalue that is kept: task, layer, rank and eigenvalue."""
    rows: list[list[Any]] = []
    for number, fisher in enumerate(information, 1):
        for name, layer in fisher["layers"].items():
            pairs = zip(layer["ranks"], layer["eigenvalues"], strict=True)
            rows += [[str(number), name, rank, value] for rank, value in pairs]
    return ["task", "layer", "rank", "eigenvalue"], rows


def show_results(
    results: Mapping[str, Any], title: str, directory: Path, sync_command: str | None
) -> None:
    """Print the table of accuracies, the remarks, the final figures and where the results are.

    Args:
        results: the content of ``results.json``.
        title: the title of the table.
        directory: the run's folder.
        sync_command: the command that uploads the run to W&B; ``None`` if there is none.
    """
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
    console = Console()
    console.print(table)
    for remark in results["remarks"]:
        console.print(f"Remark: {remark}", highlight=False, soft_wrap=True)
    seconds = ", ".join(f"{key} {value:.1f}" for key, value in results["seconds"].items())
    console.print(
        f"average accuracy {final:.2f} %, forgetting {100 * results['forgetting']:.2f} points; "
        f"seconds: {seconds}",
        highlight=False,
        soft_wrap=True,
    )
    print(f"results: {os.path.relpath(directory)}")
    if sync_command:
        print(f"to upload the run to Weights & Biases: {sync_command}")
