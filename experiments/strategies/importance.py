"""Quadratic penalties with another importance than the Fisher information."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from ewc import DiagonalFisher, EWCPenalty, FisherMatrix
from ewc.consolidation.combination import Consolidation
from ewc.finite_steps import FiniteSteps, task_number
from ewc.growth import Growth
from ewc.parameters import Parameters
from ewc.penalty_checks import PenaltyChecks


class ImportancePlugin(SupervisedPlugin, ABC):
    r"""EWC's penalty with an importance :math:`\Omega` in place of the Fisher information.

    The penalty of one task is :math:`\lambda / 2 \cdot \sum_p \Omega_p (\theta_p - a_p)^2`
    around the parameters ``a`` after the task.

    Args:
        strength: :math:`\lambda`.
        consolidation: how the quadratics of several tasks are combined.

    Attributes:
        penalty: the penalty in the loss.
        fisher: the importance of the last task, as a diagonal matrix; ``None`` before the
            first task.
        last_penalty: the penalty's value in the current iteration, without gradient.
        growth: how much the parameters have grown in training.
    """

    def __init__(self, strength: float, consolidation: Consolidation) -> None:
        super().__init__()
        self.penalty = EWCPenalty(strength, consolidation)
        self.fisher: FisherMatrix | None = None
        self.last_penalty = torch.zeros(())
        self.growth = Growth()
        self._finite = FiniteSteps()
        self._checks = PenaltyChecks(self.growth)

    @abstractmethod
    def importance(self, strategy: Any) -> Parameters:
        """The importance of every parameter for the task that was just trained."""

    def num_examples(self, strategy: Any) -> int:
        """The weight of the task in training relative to other tasks: its size."""
        return len(strategy.experience.dataset)

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Set the weight of the task in training."""
        self.penalty.num_examples = self.num_examples(strategy)
        self._finite = FiniteSteps(self.penalty, self.growth)
        self.growth.start(strategy.model)

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the penalty to the loss of the current mini-batch.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.penalty.terms:
            value = self.penalty(strategy.model)
            self.last_penalty = value.detach()
            strategy.loss = strategy.loss + value
        self._finite.check_loss(strategy)

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Note the gradients' norms on an accelerator, and check the first step of a task.

        Warns:
            UserWarning: gradient descent on the penalty diverges (:meth:`EWCPenalty.stiffness`).
        """
        self._checks.before_update(self.penalty, strategy)
        self._finite.note_gradients(strategy)

    def state(self) -> dict[str, Any]:
        """What training needs to go on: tensors and plain values."""
        return {"penalty": self.penalty.get_extra_state(), "last_penalty": self.last_penalty}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        self.penalty.set_extra_state(state["penalty"])
        self.last_penalty = state["last_penalty"].to(strategy.device)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Measure the importance and add the task to the penalty.

        Raises:
            FloatingPointError: a loss or the importance is not finite.
        """
        self._finite.look(strategy)
        self._checks.after_task(self.penalty, strategy)
        matrix = DiagonalFisher(self.importance(strategy), self.num_examples(strategy))
        try:
            self.penalty.consolidate(matrix, strategy.model)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"The importance is not finite after task {task_number(strategy)}: {error}"
            ) from error
        self.fisher = matrix
