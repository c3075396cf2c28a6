"""Parameters that have grown beyond any use, though every number is finite."""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ewc.wrappers import named_parameters

NORM_GROWTH = 1e6
"""The growth of a layer's parameters above which training counts as diverged."""


class Growth:
    """How much larger the parameters are than before training; warns once.

    Attributes:
        initial: the norms of the parameters before training, by name; empty before.
        warned: whether divergence has been said, here or by another check.
    """

    def __init__(self) -> None:
        self.initial: dict[str, float] = {}
        self.warned = False

    def start(self, model: nn.Module) -> None:
        """Keep the norms of the parameters, in the first task only."""
        self.initial = self.initial or norms(model)

    def largest(self, model: nn.Module) -> tuple[float, str]:
        """The largest growth of a layer's norm, and the layer; 0 without any.

        A layer may start from zeros: the whole network's root mean square is its unit then.
        """
        sizes = {n: p.numel() for n, p in named_parameters(model) if n in self.initial}
        squares = sum(self.initial[name] ** 2 for name in sizes)
        unit = math.sqrt(squares / max(1, sum(sizes.values())))
        start = {n: max(self.initial[n], unit * math.sqrt(size)) for n, size in sizes.items()}
        now = norms(model)
        return max(((now[n] / start[n], n) for n in sizes if start[n]), default=(0.0, ""))

    def check(self, model: nn.Module, task: int, step: int) -> None:
        """Warn of the layer that has grown most, if it is beyond :data:`NORM_GROWTH`.

        Warns:
            UserWarning: a layer has; the message names it.
        """
        if self.warned:
            return
        growth, name = self.largest(model)
        if growth > NORM_GROWTH:
            self.warned = True
            warnings.warn(
                f"In task {task} the parameters {name} are {growth:.3g} times as large after step "
                f"{step} as before training: the learning rate is probably too large.",
                stacklevel=2,
            )

    def restore(self, initial: Mapping[str, float], *, warned: bool) -> None:
        """Go on from the attributes of an earlier process."""
        self.initial, self.warned = dict(initial), warned


def norms(model: nn.Module) -> dict[str, float]:
    """The Euclidean norm of every parameter, by name; one value is read back."""
    parameters = {name: p.detach() for name, p in named_parameters(model)}
    if not parameters:
        return {}
    values = torch._foreach_norm(list(parameters.values()))
    place = values[0].device
    read = torch.stack([norm.to(place, torch.float32) for norm in values]).tolist()
    return dict(zip(parameters, read, strict=True))
