"""Signs that a run with finite numbers is worthless: a loss that grows, tasks not learnt."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ewc.growth import Growth

_log = logging.getLogger(__name__)

LOSS_GROWTH = 10.0
"""The growth of the loss above which a run counts as diverged."""

STANDARD_ERRORS = 3.0
"""How far above chance an accuracy must be to count as learnt."""


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


def warn_of_unlearnt(matrix: Sequence[Sequence[float]], labels: Sequence[Tensor]) -> None:
    """Warn of the first task that training has left at chance.

    Chance is the share of the most frequent class.

    Args:
        matrix: the accuracies on each task, one row for each task learnt.
        labels: the test labels of each task.
    """
    number = len(matrix) - 1
    learnt = [row[task] > _beyond_chance(labels[task]) for task, row in enumerate(matrix)]
    if all(learnt[:number]) and not learnt[number]:
        firm = "the strategy holds the parameters too firmly (strategy.strength) or "
        _log.warning(
            "Task %d is not learnt: after its training the accuracy on it is %.1f %%, no better "
            "than chance, so %soptimizer.lr is too small or too large%s.",
            number + 1,
            100 * matrix[number][number],
            firm if number else "",
            "" if number else ", or training too short",
        )


def _beyond_chance(labels: Tensor) -> float:
    """The accuracy that guessing exceeds with a chance of about one in a thousand."""
    chance = float(torch.bincount(labels).max()) / len(labels)
    return chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / len(labels))
