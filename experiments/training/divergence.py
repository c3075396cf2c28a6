"""Signs that a run with finite numbers is worthless: diverged parameters, tasks not learnt."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

LOSS_GROWTH, NORM_GROWTH = 10.0, 1e6
"""The growth of the loss and of a layer's parameters above which a run counts as diverged."""

STANDARD_ERRORS = 3.0
"""How far above chance an accuracy must be to count as learnt."""


def norms(model: nn.Module) -> dict[str, float]:
    """The Euclidean norm of every parameter, by name; one value is read back."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    values = torch.stack([norm.double() for norm in torch._foreach_norm(list(parameters.values()))])
    return dict(zip(parameters, values.tolist(), strict=True))


class Divergence:
    """Warns once of parameters or a loss that have grown beyond any use.

    Args:
        initial: the norms of the parameters before training.
        warned: whether it has warned.
    """

    def __init__(self, initial: dict[str, float], *, warned: bool = False) -> None:
        self.initial = initial
        self.warned = warned

    def check_parameters(self, model: nn.Module, task: int, step: int) -> None:
        """Warn of the layer that has grown most, if it is beyond :data:`NORM_GROWTH`."""
        if self.warned:
            return
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        # A layer may start from zeros: the whole network's root mean square is its unit then.
        squares = sum(norm**2 for norm in self.initial.values())
        unit = math.sqrt(squares / sum(sizes.values()))
        start = {n: max(self.initial[n], unit * math.sqrt(size)) for n, size in sizes.items()}
        growth = {n: norm / start[n] for n, norm in norms(model).items() if start[n]}
        name = max(growth, key=growth.__getitem__, default="")
        if name and growth[name] > NORM_GROWTH:
            self._warn(
                f"In task {task} the parameters {name} are {growth[name]:.3g} times as large after "
                f"step {step} as before training"
            )

    def check_loss(self, first: float, last: float, task: int) -> None:
        """Warn if a task's loss has grown.

        Below a nat it may rise tenfold where a penalty holds the parameters.
        """
        if not self.warned and last > LOSS_GROWTH * max(first, 1.0):
            self._warn(f"In task {task} the loss went from {first:.3g} to {last:.3g}")

    def _warn(self, what: str) -> None:
        self.warned = True
        _log.warning("%s: optimizer.lr is probably too large.", what)


def warn_of_unlearnt(matrix: Sequence[Sequence[float]], labels: Sequence[Tensor]) -> None:
    """Warn of the first task that training has left at chance, where the first one was learnt.

    Chance is the share of the most frequent class.

    Args:
        matrix: the accuracies on each task, one row for each task learnt.
        labels: the test labels of each task.
    """
    number = len(matrix) - 1
    learnt = [row[task] > _beyond_chance(labels[task]) for task, row in enumerate(matrix)]
    if learnt[0] and all(learnt[:number]) and not learnt[number]:
        _log.warning(
            "Task %d is not learnt: after its training the accuracy on it is %.1f %%, no better "
            "than chance, so the strategy holds the parameters too firmly (strategy.strength) or "
            "optimizer.lr is too small or too large.",
            number + 1,
            100 * matrix[number][number],
        )


def _beyond_chance(labels: Tensor) -> float:
    """The accuracy that guessing exceeds with a chance of about one in a thousand."""
    chance = float(torch.bincount(labels).max()) / len(labels)
    return chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / len(labels))
