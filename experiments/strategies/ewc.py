"""Elastic Weight Consolidation: one quadratic per task, one in all, and Avalanche's plugin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avalanche.training.plugins import EWCPlugin as AvalanchePlugin
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.utils import ParamData

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
        return [StatefulAvalanchePlugin(self.strength, mode="separate")]


class StatefulAvalanchePlugin(AvalanchePlugin):
    """Avalanche's plugin with a state."""

    def state(self) -> dict[str, Any]:
        """Anchors and importances by task."""
        return {"anchors": _tensors(self.saved_params), "importances": _tensors(self.importances)}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        place = strategy.device
        for name, kept in (("anchors", self.saved_params), ("importances", self.importances)):
            for task, tensors in state[name].items():
                kept[int(task)] = {
                    key: ParamData(key, init_tensor=value.to(place), device=place)
                    for key, value in tensors.items()
                }


def _tensors(kept: Mapping[int, Mapping[str, ParamData]]) -> dict[str, Any]:
    return {str(task): {k: value.data for k, value in of.items()} for task, of in kept.items()}
