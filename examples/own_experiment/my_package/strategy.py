"""A strategy of one's own: each task is learnt more slowly than the one before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Strategy


@dataclass(frozen=True)
class SlowDown(Strategy):
    """Fine-tuning with a smaller learning rate after each task.

    Attributes:
        factor: what is left of the learning rate at each new task.

    Raises:
        ValueError: the factor is not between 0 and 1.
    """

    factor: float = 0.3

    def __post_init__(self) -> None:
        """Check the factor."""
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must lie in (0, 1], got {self.factor}.")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugins of Avalanche's training loop."""
        return [SmallerSteps(self.factor)]


class SmallerSteps(SupervisedPlugin):
    """Lowers the learning rate after each task."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Lower the learning rate."""
        for group in strategy.optimizer.param_groups:
            group["lr"] *= self.factor

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the plugin: nothing, as the optimizer has the rate."""
        return {}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a checkpoint."""
