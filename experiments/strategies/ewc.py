"""Elastic Weight Consolidation: one quadratic per task, one in all, and Avalanche's plugin."""

from dataclasses import dataclass

from avalanche.training.plugins import EWCPlugin as AvalanchePlugin
from avalanche.training.plugins import SupervisedPlugin

from ewc import Online, Separate
from ewc.consolidation.combination import Consolidation
from ewc.consolidation.update import InLoss, Update
from ewc.plugin import EWCPlugin
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Penalised


@dataclass(frozen=True)
class EWC(Penalised):
    r"""One quadratic per task (Kirkpatrick et al. 2017).

    Attributes:
        strength: :math:`\lambda`; 1 is the Bayes value.
        shrinkage: the fraction of the information that is spread over a layer's units.
        update: how the penalty moves the parameters.

    Raises:
        ValueError: a number is out of range.
    """

    shrinkage: float = 0.0
    update: Update = InLoss()

    def __post_init__(self) -> None:
        """Check the numbers."""
        self.plugins(Fisher())

    def consolidation(self) -> Consolidation:
        """How the quadratics of several tasks are combined."""
        return Separate()

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The EWC plugin."""
        plugin = EWCPlugin(
            self.strength,
            likelihood=fisher.likelihood,
            estimator=fisher.estimator,
            structure=fisher.request,
            consolidation=self.consolidation(),
            shrinkage=self.shrinkage,
            update=self.update,
        )
        return [plugin]


@dataclass(frozen=True)
class OnlineEWC(EWC):
    r"""One quadratic in all, around the last parameters (Schwarz et al. 2018).

    Attributes:
        strength: :math:`\lambda`; 1 is the Bayes value.
        shrinkage: as of :class:`EWC`.
        update: as of :class:`EWC`.
        decay: :math:`\gamma`, the factor of the old sum at each new task.

    Raises:
        ValueError: a number is out of range.
    """

    decay: float = 1.0

    def consolidation(self) -> Consolidation:
        """How the quadratics of several tasks are combined."""
        return Online(self.decay)


@dataclass(frozen=True)
class AvalancheEWC(Penalised):
    r"""Avalanche's plugin, for comparison: batch-mean gradients, :math:`\lambda F d^2`.

    Attributes:
        strength: its ``ewc_lambda``; without the half of the other strategies.

    Raises:
        ValueError: the strength is negative or not finite.
    """

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugin, which does not use ``fisher``."""
        return [AvalanchePlugin(self.strength, mode="separate")]
