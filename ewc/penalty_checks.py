"""What a training loop of Avalanche says of its penalty, once each."""

import warnings
from typing import Any

from ewc.finite_steps import task_number
from ewc.penalty import EWCPenalty

LEAST_PULL = 1e-4
"""The penalty's gradient relative to the whole one below which it does not change training."""


class PenaltyChecks:
    """Warns of a penalty that must make training diverge, and of one that does not matter.

    Args:
        explicit: whether it is in the loss, and not moved by implicit steps.
        remedy: what helps against divergence besides smaller numbers; with its comma.
    """

    def __init__(self, *, explicit: bool = True, remedy: str = "") -> None:
        self.explicit = explicit
        self.remedy = remedy
        self._measured_in: int | None = None
        self._said: set[str] = set()

    def before_update(self, penalty: EWCPenalty, strategy: Any) -> None:
        """Warn in the first step of a task if the penalty is too stiff for gradient descent.

        By then the learning rate is set, and the gradients show which parameters move.

        Warns:
            UserWarning: strength * Fisher * learning rate exceeds the optimizer's limit.
        """
        task = task_number(strategy)
        if task == self._measured_in or not penalty.terms:
            return
        self._measured_in = task
        if not self.explicit or "stiff" in self._said:
            return
        stiffness = penalty.stiffness(strategy.model, strategy.optimizer)
        if stiffness and stiffness.ratio > 1:
            self._said.add("stiff")
            rate = max(float(group["lr"]) for group in strategy.optimizer.param_groups)
            warnings.warn(
                f"From task {task} on training diverges along the penalty's stiffest direction, as "
                f"strength * Fisher * learning rate is {stiffness.product:.3g} and must be below "
                f"{stiffness.limit:.3g}: use a strength below "
                f"{penalty.strength / stiffness.ratio:.2g}, a learning rate below "
                f"{rate / stiffness.ratio:.2g}{self.remedy}.",
                stacklevel=2,
            )

    def after_task(self, penalty: EWCPenalty, strategy: Any) -> None:
        """Warn at the end of a task if the penalty did not matter.

        Warns:
            UserWarning: the penalty's gradient is below :data:`LEAST_PULL` times the whole one.
        """
        if not penalty.terms or "weak" in self._said:
            return
        pull = penalty.pull(strategy.model)
        # Exactly 0: a strength or a Fisher matrix of 0, or parameters that did not move.
        if pull is not None and 0 < pull < LEAST_PULL:
            self._said.add("weak")
            warnings.warn(
                f"The penalty did not matter in task {task_number(strategy)}, as at its end the "
                f"penalty's gradient was {pull:.1g} times the whole one: use a larger strength "
                f"than {penalty.strength:g}.",
                stacklevel=2,
            )
