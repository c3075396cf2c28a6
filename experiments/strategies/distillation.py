"""Learning without Forgetting, by Avalanche."""

import copy
from collections.abc import Mapping
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
        return [DistillationPlugin(self.alpha, self.temperature)]


class DistillationPlugin(LwFPlugin):
    """Avalanche's plugin with :class:`Distillation`, and with a state."""

    def __init__(self, alpha: float, temperature: float) -> None:
        super().__init__(alpha, temperature)
        self.lwf = Distillation(alpha, temperature)

    def state(self) -> dict[str, Any]:
        """The network after the last task, and which outputs it has learnt."""
        old = self.lwf.prev_model
        classes = {str(t): sorted(c) for t, c in self.lwf.prev_classes_by_task.items()}
        return {
            "model": None if old is None else old.state_dict(),
            "classes": classes,
            "count": self.lwf.expcount,
        }

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        self.lwf.expcount = state["count"]
        for task, classes in state["classes"].items():
            self.lwf.prev_classes_by_task[int(task)] = set(classes)
        if state["model"] is not None:
            self.lwf.prev_model = copy.deepcopy(strategy.model)
            self.lwf.prev_model.load_state_dict(state["model"])


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
