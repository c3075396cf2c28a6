"""What a training loop of Avalanche says of its penalty, once each."""

import math
import warnings
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc.consolidation.stiffness import Stiffness
from ewc.finite_steps import task_number
from ewc.growth import Growth
from ewc.penalty import EWCPenalty
from ewc.wrappers import named_parameters

LEAST_PULL = 1e-4
"""The penalty's gradient relative to the whole one below which it does not change training."""

SANE_GROWTH = 10.0
"""The growth of a layer's parameters above which training has diverged, whatever the penalty."""


class PenaltyChecks:
    """Warns of a penalty that must make training diverge, and of one that does not matter.

    Args:
        growth: how much the parameters have grown in training.
        explicit: whether it is in the loss, and not moved by implicit steps.
        remedy: what helps against divergence besides smaller numbers; with its comma.
    """

    def __init__(self, growth: Growth, *, explicit: bool = True, remedy: str = "") -> None:
        self.growth = growth
        self.explicit = explicit
        self.remedy = remedy
        self._measured_in: int | None = None
        self._ratio = 0.0
        self._rates: list[float] = []
        self._said: set[str] = set()

    def before_update(self, penalty: EWCPenalty, strategy: Any) -> None:
        """Warn before a step of the optimizer if the penalty is too stiff for gradient descent.

        It is measured in the first step of a task: then the gradients show which parameters move.
        It is measured again where the learning rate has risen so far that it may be beyond the
        limit.

        Warns:
            UserWarning: strength * Fisher * learning rate exceeds the optimizer's limit.
        """
        if not self.explicit or not penalty.terms or "stiff" in self._said:
            return
        task, rates = task_number(strategy), learning_rates(strategy.optimizer)
        if task == self._measured_in and not self._may_exceed(rates):
            return
        stiffness = penalty.stiffness(strategy.model, strategy.optimizer)
        self._measured_in, self._rates = task, rates
        self._ratio = stiffness.ratio if stiffness else 0.0
        if stiffness and stiffness.ratio > 1:
            self._said.add("stiff")
            self.growth.warned = True  # divergence is said here, and its cause
            rate = max(rates, default=0.0)
            warnings.warn(
                f"From task {task} on training diverges along the penalty's stiffest direction, as "
                f"strength * Fisher * learning rate is {shortened(stiffness.product, up=True)} "
                f"at a learning rate of {rate:.2g} and must be below {stiffness.limit:.3g}: use "
                f"{self._advice(stiffness, penalty.strength, rate)}; with more tasks the limits "
                "are lower, as their penalties add up.",
                stacklevel=2,
            )

    def _may_exceed(self, rates: list[float]) -> bool:
        """Whether learning rates have risen so far that the penalty may be too stiff.

        With no rate above ``c`` times the measured one, neither is the ratio.
        """
        if rates == self._rates:
            return False
        pairs = list(zip(rates, self._rates, strict=False))
        from_zero = any(now > before == 0 for now, before in pairs)
        growth = max((now / before for now, before in pairs if before), default=1.0)
        return from_zero or growth * self._ratio > 1

    def _advice(self, stiffness: Stiffness, strength: float, rate: float) -> str:
        """The numbers below the limit."""
        ways = [f"a learning rate below {shortened(rate / stiffness.ratio)}"]
        # Weight decay alone may be beyond the limit.
        share = (stiffness.limit - stiffness.decay) / stiffness.product
        if share > 0:
            ways.insert(0, f"a strength below {shortened(share * strength)}")
        return ", ".join(ways) + self.remedy

    def after_task(self, penalty: EWCPenalty, strategy: Any) -> None:
        """Warn at the end of a task if the penalty could not matter.

        Its gradient is scaled to parameters that have moved by their own size.  So a learning rate
        too small to move them is not taken for a strength that is too small.

        Warns:
            UserWarning: the scaled gradient is below :data:`LEAST_PULL` times the whole one.
        """
        if not penalty.terms or "weak" in self._said:
            return
        pull, moved = penalty.pull(strategy.model), self._moved(penalty, strategy)
        # Exactly 0: a strength or a Fisher matrix of 0, or parameters that did not move.
        if not pull or not moved or not pull < LEAST_PULL * min(1.0, moved):
            return
        if self.growth.largest(strategy.model)[0] > SANE_GROWTH:
            return
        self._said.add("weak")
        warnings.warn(
            f"The penalty did not matter in task {task_number(strategy)}, as at its end the "
            f"penalty's gradient was {pull:.1g} times the whole one: use a larger strength "
            f"than {penalty.strength:g}.",
            stacklevel=2,
        )

    @staticmethod
    def _moved(penalty: EWCPenalty, strategy: Any) -> float:
        """The distance of the parameters from the last anchor, relative to the anchor's norm."""
        last = penalty.terms[-1]
        here = dict(named_parameters(strategy.model))
        step = last.step_to({name: here[name].detach() for name in last.anchor})
        size = total_norm(last.anchor)
        return total_norm(step) / size if size else 0.0


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rates of the groups; 0 for a tensor, which may be on an accelerator."""
    rates = [group.get("lr", 0.0) for group in optimizer.param_groups]
    return [0.0 if isinstance(rate, Tensor) else float(rate) for rate in rates]


def total_norm(tensors: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all entries together."""
    return float(torch.nn.utils.get_total_norm(list(tensors.values())))


def shortened(number: float, *, up: bool = False) -> str:
    """A number above 0 with two digits, rounded down, or with three, rounded up."""
    if not 0 < number < math.inf:
        return f"{number:g}"
    exact = Decimal(number)
    last = Decimal(1).scaleb(exact.adjusted() - (2 if up else 1))
    rounded = exact.quantize(last, rounding=ROUND_CEILING if up else ROUND_FLOOR)
    return f"{rounded.normalize():f}" if 1e-4 <= rounded < 1e6 else f"{float(rounded):.3g}"
