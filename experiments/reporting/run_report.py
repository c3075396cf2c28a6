"""The table of accuracies that a run prints at its end."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


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


def show_results(results: Mapping[str, Any], title: str, console: Console) -> None:
    """Print the table of accuracies and the remarks."""
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
    for remark in results["remarks"]:
        console.print(f"Remark: {remark}", highlight=False, soft_wrap=True)
