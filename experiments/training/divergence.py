"""Signs that a run with finite numbers is worthless: a loss that grows, tasks not learnt."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ewc.growth import Growth
from experiments.recording.metrics import Matrix, unlearnt

_log = logging.getLogger(__name__)

LOSS_GROWTH = 10.0
"""The growth of the loss above which a run counts as diverged."""


def warn_of_loss(growth: Growth, first: float, last: float, task: int) -> None:
    """Warn if a task's loss has grown, unless something was said of growth before.

    Below a nat it may rise tenfold where a penalty holds the parameters.
    """
    if not growth.warned and last > LOSS_GROWTH * max(first, 1.0):
        growth.warned = True
        _log.warning(
            "In task %d the loss went from %.3g to %.3g: optimizer.lr is probably too large.",
            task,
            first,
            last,
        )


def warn_of_unlearnt(matrix: Matrix, guessing: Sequence[Mapping[str, float]]) -> None:
    """Warn of the first task that is not learnt; :func:`unlearnt` has the arguments."""
    number = len(matrix) - 1
    if unlearnt(matrix, guessing) == [number]:
        firm = "the strategy holds the parameters too firmly (strategy.strength) or "
        _log.warning(
            "Task %d is not learnt: after its training the accuracy on it is %.1f %%, where "
            "guessing reaches %.1f %%, so %soptimizer.lr is too small or too large%s.",
            number + 1,
            100 * matrix[number][number],
            100 * guessing[number]["accuracy"],
            firm if number else "",
            "" if number else ", or training too short",
        )


def accuracy_of_guessing(labels: Tensor) -> dict[str, float]:
    """The share of the most frequent class, and its standard error over the examples."""
    chance = float(torch.bincount(labels).max()) / len(labels)
    return {"accuracy": chance, "error": math.sqrt(chance * (1 - chance) / len(labels))}
