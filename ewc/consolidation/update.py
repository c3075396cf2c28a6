"""How the penalty moves the parameters: as a term of the loss, or by implicit steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc.checks import check_count, check_instance, check_positive_share
from ewc.consolidation.quadratic import Quadratic

VALUED_EVERY = 10
"""Implicit steps from one evaluation of the penalty to the next, for ``last_penalty``."""


class Penalty(Protocol):
    """What an update needs of a penalty, as :class:`ewc.EWCPenalty` has it."""

    terms: list[Quadratic]
    eigenvector_share: float

    def __call__(self, model: nn.Module) -> Tensor:
        """The value at the model's present parameters."""

    def implicit_step(self, model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
        """Move the model by an implicit step for the last steps of an optimizer."""


class RunningUpdate:
    """An update at work in a training loop of any trainer.

    The loop calls :meth:`loss_term` before each backward pass, :meth:`after_step` after each step
    of the optimizer and :meth:`catch_up` at the end of a task.  By default they do nothing.

    Args:
        penalty: the penalty that moves the parameters.

    Attributes:
        explicit: whether the optimizer follows the penalty's gradient, so that training diverges if
            the strength is too large.
        last_penalty: the penalty's last value, a tensor without gradient; 0 before the first task.
    """

    explicit: ClassVar[bool] = False

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty
        self.last_penalty = torch.zeros(())

    def loss_term(self, model: nn.Module) -> Tensor | None:
        """What to add to the loss of a step, a scalar in nats per example; ``None`` for nothing.

        Raises:
            ValueError: the penalty does not fit the model, here as in the other two methods.
        """
        return None

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Move the model after a step of the optimizer, if a move is due."""

    def catch_up(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Move the model for the steps since the last move."""

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides the penalty: tensors and plain values."""
        return {"last_penalty": self.last_penalty}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a :meth:`state`, with tensors on ``device``."""
        self.last_penalty = state["last_penalty"].to(device)


@dataclass(frozen=True)
class InLoss:
    """The penalty is added to the loss of every training step.

    Attributes:
        eigenvector_share: average fraction of the eigenvectors of Kronecker matrices used per
            step; stiff ones are used more often (:mod:`ewc.consolidation.pacing`).  1 uses all,
            for several times the cost of a training step.  Accelerators always use all.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """

    eigenvector_share: float = 1.0

    def __post_init__(self) -> None:
        """Check the share."""
        check_positive_share(self.eigenvector_share, "eigenvector_share")

    def start(self, penalty: Penalty) -> RunningUpdate:
        """The update at work with a penalty, which takes over the share."""
        penalty.eigenvector_share = self.eigenvector_share
        return _RunningInLoss(penalty)


class _RunningInLoss(RunningUpdate):
    explicit = True

    def loss_term(self, model: nn.Module) -> Tensor | None:
        if not self.penalty.terms:
            return None
        value = self.penalty(model)
        self.last_penalty = value.detach()
        return value


@dataclass(frozen=True)
class ImplicitSteps:
    """The penalty takes an implicit step after a fixed number of training steps.

    It is stable for any strength and learning rate.  Where a product with the matrix costs more
    than a training step, it is cheaper by the factor ``every``.  See
    :mod:`ewc.consolidation.implicit_step`.

    Attributes:
        every: the training steps from one implicit step to the next.

    Raises:
        ValueError: ``every`` is not a whole number, 1 or more.
    """

    every: int = 10

    def __post_init__(self) -> None:
        """Check the number."""
        check_count(self.every, "every")

    def start(self, penalty: Penalty) -> RunningUpdate:
        """The update at work with a penalty."""
        return _RunningImplicitSteps(penalty, self.every)


class _RunningImplicitSteps(RunningUpdate):
    def __init__(self, penalty: Penalty, every: int) -> None:
        super().__init__(penalty)
        self.every = every
        self._since = self._taken = 0

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.penalty.terms:
            self._since += 1
            if self._since == self.every:
                self.catch_up(model, optimizer)

    def catch_up(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self._since:
            self.penalty.implicit_step(model, optimizer, self._since)
            self._since = 0
            self._taken += 1
            if self._taken % VALUED_EVERY == 1:  # the value costs half as much as the step
                with torch.no_grad():
                    self.last_penalty = self.penalty(model)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "since": self._since, "taken": self._taken}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().restore(state, device)
        self._since, self._taken = state["since"], state["taken"]


Update = InLoss | ImplicitSteps


def check_update(value: Update) -> None:
    """Check that an argument is an update.

    Raises:
        TypeError: it is not an :class:`InLoss` or :class:`ImplicitSteps`.
    """
    allowed = "an instance of InLoss or ImplicitSteps such as InLoss()"
    check_instance(value, InLoss | ImplicitSteps, "update", allowed)
