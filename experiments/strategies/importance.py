"""Quadratic penalties with another importance than the Fisher information."""

from abc import abstractmethod
from typing import Any

from ewc import DiagonalFisher, EWCPenalty
from ewc.consolidation.combination import Consolidation
from ewc.parameters import Parameters
from ewc.plugin import PenaltyPlugin


class ImportancePlugin(PenaltyPlugin):
    r"""EWC's penalty with an importance :math:`\Omega` in place of the Fisher information.

    The penalty of one task is :math:`\lambda / 2 \cdot \sum_p \Omega_p (\theta_p - a_p)^2`
    around the parameters ``a`` after the task.

    Args:
        strength: :math:`\lambda`.
        consolidation: how the quadratics of several tasks are combined.
    """

    noun = "importance"

    def __init__(self, strength: float, consolidation: Consolidation) -> None:
        super().__init__(EWCPenalty(strength, consolidation))

    @abstractmethod
    def importance(self, strategy: Any) -> Parameters:
        """The importance of every parameter for the task that was just trained."""

    def information(self, strategy: Any, **_: Any) -> DiagonalFisher:
        """The importance as a diagonal matrix."""
        return DiagonalFisher(self.importance(strategy), self.num_examples(strategy))
