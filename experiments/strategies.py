"""What is done against forgetting: the continual-learning strategies by name."""

from dataclasses import dataclass, field
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from ewc import DiagonalFisher, Exact, FisherMatrix, Online, Separate
from ewc.consolidation import Consolidation
from ewc.fisher import Estimator
from ewc.fisher.accumulator import Configured
from ewc.fisher.matrix import check_not_negative
from ewc.plugin import EWCPlugin
from experiments.loaders import InMemoryJoint, InMemoryNaive


@dataclass(frozen=True)
class Fisher:
    """How the Fisher information is taken, for the strategies that use it.

    Attributes:
        estimator: how the expectation over labels is taken.
        structure: what of the matrix is kept.
    """

    estimator: Estimator = field(default_factory=Exact)
    structure: type[FisherMatrix] | Configured[Any] = DiagonalFisher


@dataclass(frozen=True)
class Strategy:
    """Fine-tuning with some plugins."""

    def template(self) -> type[InMemoryNaive]:
        """The training loop of Avalanche."""
        return InMemoryNaive

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """What is added to the loop."""
        return []


@dataclass(frozen=True)
class Naive(Strategy):
    """Nothing against forgetting: the lower reference."""


@dataclass(frozen=True)
class Joint(Strategy):
    """All images of all tasks so far: the upper reference."""

    def template(self) -> Any:
        """The loop over all tasks so far."""
        return InMemoryJoint


@dataclass(frozen=True)
class EWC(Strategy):
    r"""One quadratic a task (Kirkpatrick et al. 2017).

    Attributes:
        strength: :math:`\lambda`; 1 is the Bayes value.

    Raises:
        ValueError: the strength is negative or not finite.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the strength."""
        check_not_negative(self.strength, "strength")

    def consolidation(self) -> Consolidation:
        """How tasks are put together."""
        return Separate()

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The EWC plugin."""
        plugin = EWCPlugin(
            self.strength,
            estimator=fisher.estimator,
            structure=fisher.structure,
            consolidation=self.consolidation(),
        )
        return [plugin]


@dataclass(frozen=True)
class OnlineEWC(EWC):
    r"""One quadratic in all, around the last parameters (Schwarz et al. 2018).

    Attributes:
        strength: :math:`\lambda`; 1 is the Bayes value.
        decay: :math:`\gamma`, what is left of the old sum at each new task.

    Raises:
        ValueError: the strength is negative or not finite, or the decay outside [0, 1].
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        """Check strength and decay."""
        super().__post_init__()
        Online(self.decay)

    def consolidation(self) -> Consolidation:
        """How tasks are put together."""
        return Online(self.decay)
