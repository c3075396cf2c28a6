"""What a strategy is, and the two references: fine-tuning and joint training."""

from dataclasses import dataclass
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from ewc.checks import check_not_negative
from experiments.strategies.fisher import Fisher
from experiments.training.loaders import InMemoryJoint, InMemoryNaive


@dataclass(frozen=True)
class Strategy:
    """Fine-tuning with some plugins."""

    def template(self) -> type[InMemoryNaive]:
        """The training loop of Avalanche."""
        return InMemoryNaive

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugins of the training loop."""
        return []


@dataclass(frozen=True)
class Naive(Strategy):
    """No method against forgetting: the lower reference."""


@dataclass(frozen=True)
class Joint(Strategy):
    """All images of all tasks so far: the upper reference."""

    def template(self) -> Any:
        """The loop over all tasks so far."""
        return InMemoryJoint


@dataclass(frozen=True)
class Penalised(Strategy):
    r"""A quadratic penalty around the parameters of the earlier tasks.

    Attributes:
        strength: :math:`\lambda`.

    Raises:
        ValueError: the strength is negative or not finite.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the strength."""
        check_not_negative(self.strength, "strength")
