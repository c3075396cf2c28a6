"""Learning without Forgetting, by Avalanche, over our experiences."""

import copy
from typing import Any

from avalanche.training import LearningWithoutForgetting


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
