"""The L2 penalty around the last parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from ewc import Online
from ewc.parameters import Parameters, trainable_parameters
from experiments.strategies.fisher import Fisher
from experiments.strategies.importance import ImportancePlugin
from experiments.strategies.strategy import Penalised


@dataclass(frozen=True)
class L2(Penalised):
    """The same penalty for all parameters, around their last values."""

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugin, which does not use ``fisher``."""
        return [L2Plugin(self.strength)]


class L2Plugin(ImportancePlugin):
    r"""The penalty :math:`\lambda / 2 \cdot |\theta - a|^2` around the last parameters.

    Args:
        strength: :math:`\lambda`.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength, Online(decay=0.0))

    def importance(self, strategy: Any) -> Parameters:
        """One for every parameter."""
        parameters = trainable_parameters(strategy.model)
        return {name: torch.ones_like(value) for name, value in parameters.items()}
