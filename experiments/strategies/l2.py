"""The L2 penalty around the last parameters."""

from dataclasses import dataclass

from avalanche.training.plugins import SupervisedPlugin

from ewc import DiagonalFisher, Online
from ewc.fisher.diagonal import DiagonalSum
from ewc.fisher.pullback import Chunk
from ewc.parameters import Parameters
from ewc.plugin import EWCPlugin
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Penalised


@dataclass(frozen=True)
class L2(Penalised):
    """All parameters held alike at their last values."""

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """EWC's plugin with an importance of 1."""
        return [l2(self.strength)]


def l2(strength: float) -> EWCPlugin:
    r"""The penalty :math:`\lambda / 2 \cdot |\theta - a|^2` around the last parameters.

    Args:
        strength: :math:`\lambda`.
    """
    return EWCPlugin(strength, structure=UnitImportance, consolidation=Online(decay=0.0))


class UnitImportance(DiagonalFisher):
    """Every parameter matters alike: the L2 penalty around the last parameters."""

    @classmethod
    def accumulator(cls, parameters: Parameters) -> "Ones":
        """Nothing to add up."""
        return Ones(parameters)


class Ones(DiagonalSum):
    """One for every example."""

    def add(self, chunk: Chunk) -> None:
        """Add one for every example."""
        for total in self.total.values():
            total.add_(chunk.scores.shape[1])
