"""Learning without Forgetting, by Avalanche."""

import copy
from dataclasses import dataclass
from typing import Any

from avalanche.training import LearningWithoutForgetting
from avalanche.training.plugins import LwFPlugin, SupervisedPlugin

from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Strategy


@dataclass(frozen=True)
class LwF(Strategy):
    """Learning without Forgetting: distillation of the old outputs on the new images.

    Attributes:
        alpha: the weight of the distillation.
        temperature: the temperature of the softmax.

    Raises:
        ValueError: a number is not above 0.
    """

    alpha: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("alpha", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """Avalanche's plugin, with the classes from the experiences."""
        plugin = LwFPlugin(self.alpha, self.temperature)
        plugin.lwf = Distillation(self.alpha, self.temperature)
        return [plugin]


class Distillation(LearningWithoutForgetting):
    """Avalanche's distillation, with classes and tasks from the experience, not its data set."""

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Keep the network after a task, and which outputs it has learnt.

        Args:
            agent: the strategy.
            exp: the experience, with its labels and, where it is known, its task.
        """
        self.expcount += 1
        self.prev_model = copy.deepcopy(agent.model)
        task = exp.data.task or 0
        self.prev_classes_by_task[task] |= set(exp.classes_in_this_experience)
