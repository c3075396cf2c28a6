"""What is done against forgetting: the continual-learning strategies by name."""

from dataclasses import dataclass, field
from typing import Any

from avalanche.training.plugins import EWCPlugin as AvalanchePlugin
from avalanche.training.plugins import LwFPlugin, SupervisedPlugin

from ewc import (
    Categorical,
    DiagonalFisher,
    Exact,
    FisherMatrix,
    Likelihood,
    Online,
    Separate,
)
from ewc.checks import check_not_negative
from ewc.consolidation import Consolidation
from ewc.fisher import Estimator
from ewc.fisher.accumulator import Configured
from ewc.plugin import EWCPlugin
from ewc.update import InLoss, Update
from experiments.distillation import Distillation
from experiments.importance import (
    BatchMeanGradients,
    BatchMeans,
    SynapticIntelligencePlugin,
    l2,
    memory_aware_synapses,
)
from experiments.loaders import InMemoryJoint, InMemoryNaive


@dataclass(frozen=True)
class Fisher:
    """How the Fisher information is taken, for the strategies that use it.

    Attributes:
        likelihood: what the network's outputs mean.
        estimator: how the expectation over labels is taken.
        structure: what of the matrix is kept.

    Raises:
        ValueError: another structure than the diagonal, of batch means.
    """

    likelihood: Likelihood = field(default_factory=Categorical)
    estimator: Estimator = field(default_factory=Exact)
    structure: type[FisherMatrix] | Configured[Any] = DiagonalFisher

    def __post_init__(self) -> None:
        """Check that the two fit together."""
        if isinstance(self.estimator, BatchMeans) and self.structure is not DiagonalFisher:
            name = getattr(self.structure, "__name__", str(self.structure))
            raise ValueError(f"structure is {name}: with BatchMeans it must be DiagonalFisher.")

    @property
    def request(self) -> type[FisherMatrix] | Configured[Any]:
        """The structure that the pass over the data is asked for."""
        return BatchMeanGradients if isinstance(self.estimator, BatchMeans) else self.structure


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
class Penalised(Strategy):
    r"""A quadratic penalty around the parameters of the tasks before.

    Attributes:
        strength: :math:`\lambda`.

    Raises:
        ValueError: the strength is negative or not finite.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the strength."""
        check_not_negative(self.strength, "strength")


@dataclass(frozen=True)
class EWC(Penalised):
    r"""One quadratic a task (Kirkpatrick et al. 2017).

    Attributes:
        strength: :math:`\lambda`; 1 is the Bayes value.
        shrinkage: the share of the information that a layer's units have alike.
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
        """How tasks are put together."""
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
        decay: :math:`\gamma`, what is left of the old sum at each new task.

    Raises:
        ValueError: a number is out of range.
    """

    decay: float = 1.0

    def consolidation(self) -> Consolidation:
        """How tasks are put together."""
        return Online(self.decay)


@dataclass(frozen=True)
class AvalancheEWC(Penalised):
    r"""Avalanche's own plugin, for comparison: batch-mean gradients, :math:`\lambda F d^2`.

    Attributes:
        strength: its ``ewc_lambda``; without the half of the other strategies.

    Raises:
        ValueError: the strength is negative or not finite.
    """

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugin, which does not look at how the Fisher information is to be taken."""
        return [AvalanchePlugin(self.strength, mode="separate")]


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
            raise ValueError("damping is 0: it must be above 0.")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugin that follows the path."""
        return [SynapticIntelligencePlugin(self.strength, self.damping)]


@dataclass(frozen=True)
class MAS(Penalised):
    """Memory Aware Synapses: gradients of the squared output norm (Aljundi et al. 2018)."""

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """EWC's plugin with this importance."""
        return [memory_aware_synapses(self.strength)]


@dataclass(frozen=True)
class L2(Penalised):
    """All parameters held alike at their last values."""

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """EWC's plugin with an importance of 1."""
        return [l2(self.strength)]


@dataclass(frozen=True)
class LwF(Strategy):
    """Learning without Forgetting, by Avalanche: the old outputs on the new images are kept.

    Attributes:
        alpha: the weight of the distillation.
        temperature: of its softmax.

    Raises:
        ValueError: a number is not above 0.
    """

    alpha: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("alpha", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """Avalanche's plugin, told of the classes by our experiences."""
        plugin = LwFPlugin(self.alpha, self.temperature)
        plugin.lwf = Distillation(self.alpha, self.temperature)
        return [plugin]
