"""How the Fisher information is taken, for the strategies that use it."""

from dataclasses import dataclass, field
from typing import Any

from ewc import Categorical, Diagonal, Exact, Likelihood
from ewc.fisher import Estimator, Structure
from experiments.strategies.batch_means import BatchMeanGradients, BatchMeans


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
    structure: Structure[Any] = field(default_factory=Diagonal)

    def __post_init__(self) -> None:
        """Check that the two fit together."""
        if isinstance(self.estimator, BatchMeans) and self.structure != Diagonal():
            raise ValueError(
                f"structure is {self.structure}: with BatchMeans it must be Diagonal()."
            )

    @property
    def request(self) -> Structure[Any]:
        """The structure that the pass over the data is asked for."""
        return BatchMeanGradients() if isinstance(self.estimator, BatchMeans) else self.structure
