"""Stops a training loop of Avalanche whose loss is not finite, without a wait in every step."""

import math
from typing import Any

import torch
from torch import Tensor

from ewc.linalg.devices import sizes_for

LOOK_EVERY = 100
"""Steps on an accelerator from one look at the losses to the next."""


class FiniteLoss:
    """Stops training at a loss that is not finite, and names the task and the step.

    On a host training stops before the optimizer steps.  Reading a loss from an accelerator would
    wait for it in every step.  There the losses are read together, every :data:`LOOK_EVERY` steps
    and at the end of a task.  The message still names the first step.  By then the optimizer has
    stepped, and the parameters may be NaN: go back to a checkpoint.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[int, Tensor]] = []

    def check(self, strategy: Any) -> None:
        """Check the loss of a step, before the optimizer steps.

        Raises:
            FloatingPointError: a loss is not finite; the message names the task and the step, both
                counted from 1.
        """
        loss = strategy.loss.detach().reshape(())  # Avalanche has a list of one number
        self._unread.append((strategy.clock.train_exp_iterations + 1, loss))
        if not sizes_for(loss.device).waits or len(self._unread) >= LOOK_EVERY:
            self.look(strategy)

    def look(self, strategy: Any) -> None:
        """Look at the losses that are not read yet, at the end of a task.

        Raises:
            FloatingPointError: as in :meth:`check`.
        """
        if not self._unread:
            return
        steps, losses = zip(*self._unread, strict=True)
        self._unread = []
        for step, loss in zip(steps, torch.stack(losses).tolist(), strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss became {loss} in task {task_number(strategy)}, step {step}: use a "
                    "smaller learning rate or a smaller strength (plain gradient descent diverges "
                    "once the largest strength * Fisher * learning rate exceeds 2)."
                )


def task_number(strategy: Any) -> int:
    """The number of the task in training, from 1."""
    return int(strategy.experience.current_experience) + 1
