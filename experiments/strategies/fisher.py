"""How the Fisher information is taken, for the strategies that use it."""

from dataclasses import dataclass, field
from typing import Any

from ewc import Categorical, Diagonal, Empirical, Exact, Likelihood
from ewc.fisher import Estimator, Structure
from experiments.strategies.batch_means import BatchMeanGradients


@dataclass(frozen=True)
class Fisher:
    """How the Fisher information is taken, for the strategies that use it.

    Attributes:
        likelihood: what the network's outputs mean.
        estimator: how the expectation over labels is taken.
        structure: what of the matrix is kept.

    Raises:
        ValueError: batch means of other gradients than those of observed labels.
    """

    likelihood: Likelihood = field(default_factory=Categorical)
    estimator: Estimator = field(default_factory=Exact)
    structure: Structure[Any] = field(default_factory=Diagonal)

    def __post_init__(self) -> None:
        """Check that the two fit together."""
        if isinstance(self.structure, BatchMeanGradients) and not isinstance(
            self.estimator, Empirical
        ):
            name = type(self.estimator).__name__
            raise ValueError(  # noqa: TRY004 - the pair does not fit, not the type
                f"estimator is {name}: with BatchMeanGradients it must be Empirical, for means "
                "over a batch are taken of the gradients of its own labels."
            )
