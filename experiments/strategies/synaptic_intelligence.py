"""Synaptic Intelligence (Zenke et al. 2017): importance from the path of the training.

Avalanche's ``SynapticIntelligencePlugin`` differs from the paper: it cuts every
importance at 0.001.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from ewc import Online
from ewc.checks import check_not_negative
from ewc.parameters import Parameters
from experiments.strategies.fisher import Fisher
from experiments.strategies.importance import ImportancePlugin
from experiments.strategies.strategy import Penalised


@dataclass(frozen=True)
class SI(Penalised):
    r"""Synaptic Intelligence: importance from the path of the training (Zenke et al. 2017).

    Attributes:
        strength: :math:`\lambda`, twice the paper's ``c``.
        damping: :math:`\xi`.

    Raises:
        ValueError: the strength is negative or not finite, or the damping not above 0.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        check_not_negative(self.damping, "damping")
        if self.damping == 0:
            raise ValueError("damping must be above 0, got 0.")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugin that follows the path."""
        return [SynapticIntelligencePlugin(self.strength, self.damping)]


class SynapticIntelligencePlugin(ImportancePlugin):
    r"""Importance from the path of the training (Zenke et al. 2017, arXiv:1703.04200).

    :math:`\Omega = \sum_t \max(0, \omega_t) / (\Delta_t^2 + \xi)` with
    :math:`\omega_t = -\sum_\tau g_\tau \cdot (\theta_{\tau+1} - \theta_\tau)` along task ``t``,
    ``g`` being the gradient of the whole loss as in van de Ven's code.  The penalty
    :math:`\lambda / 2 \cdot \Omega (\theta - a)^2` does not depend on how many examples a
    task has; the paper's ``c`` is half this strength.

    Args:
        strength: :math:`\lambda`.
        damping: :math:`\xi`.
    """

    def __init__(self, strength: float, damping: float = 0.1) -> None:
        super().__init__(strength, Online())
        self.damping = damping
        self._path: Parameters = {}
        self._before: Parameters = {}
        self._start: Parameters = {}

    def num_examples(self, strategy: Any) -> int:
        """One for every task: all tasks have the same weight, whatever their size."""
        return 1

    def before_training_exp(self, strategy: Any, **options: Any) -> None:
        """Start a new path."""
        super().before_training_exp(strategy, **options)
        self._start = _copies(strategy.model)
        self._path = {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}

    def before_update(self, strategy: Any, **options: Any) -> None:
        """Remember where the step starts."""
        super().before_update(strategy, **options)
        self._before = _copies(strategy.model)

    def after_update(self, strategy: Any, **options: Any) -> None:
        """Add the gain of the step."""
        super().after_update(strategy, **options)
        for name, parameter in strategy.model.named_parameters():
            if parameter.grad is not None and name in self._path:
                step = parameter.detach() - self._before[name]
                self._path[name].addcmul_(parameter.grad, step, value=-1.0)

    def state(self) -> dict[str, Any]:
        """The path too."""
        return {**super().state(), "path": self._path, "start": self._start}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on along the path."""
        super().restore(state, strategy)
        self._path = {name: gain.to(strategy.device) for name, gain in state["path"].items()}
        self._start = {name: value.to(strategy.device) for name, value in state["start"].items()}

    def importance(self, strategy: Any) -> Parameters:
        """The gain along the path over its squared length, from start to end, plus damping."""
        end = _copies(strategy.model)
        return {
            name: gain.clamp_min(0) / ((end[name] - self._start[name]).square() + self.damping)
            for name, gain in self._path.items()
        }


def _copies(model: torch.nn.Module) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
