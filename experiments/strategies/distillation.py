"""Learning without Forgetting, by Avalanche, over our experiences."""

import copy
from dataclasses import dataclass
from typing import Any

from avalanche.training import LearningWithoutForgetting
from avalanche.training.plugins import LwFPlugin, SupervisedPlugin

from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Strategy


@dataclass(frozen=True)
class LwF(Strategy):
    """Learning without Forgetting, by Avalanche: the old outputs on the new images are kept.

    Attributes:
        alpha: the weight of the distillation.
        temperature: of its softmax.

    Raises:
        ValueError: a number is not above 0.
    """

    alpha: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("alpha", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """Avalanche's plugin, told of the classes by our experiences."""
        plugin = LwFPlugin(self.alpha, self.temperature)
        plugin.lwf = Distillation(self.alpha, self.temperature)
        return [plugin]


class Distillation(LearningWithoutForgetting):
    """Avalanche's distillation; it asks data sets for what our experiences say themselves."""

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Keep the network after a task, and which outputs it has learnt.

        Args:
            agent: the strategy.
            exp: the experience, with its labels and, where tasks are told, its task.
        """
        self.expcount += 1
        self.prev_model = copy.deepcopy(agent.model)
        task = exp.data.task or 0
        self.prev_classes_by_task[task] |= set(exp.classes_in_this_experience)
