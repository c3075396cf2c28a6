"""How the Fisher information is taken, for the strategies that use it."""

from dataclasses import dataclass, field
from typing import Any

from ewc import Categorical, Diagonal, Exact, Likelihood
from ewc.checks import check_count
from ewc.fisher import Estimator, Structure
from experiments.strategies.batch_means import BatchMeanGradients, BatchMeans


@dataclass(frozen=True)
class Fisher:
    """How the Fisher information is taken, for the strategies that use it.

    Attributes:
        likelihood: what the network's outputs mean.
        estimator: how the expectation over labels is taken.
        structure: what of the matrix is kept.
        batch_size: images in a batch of the pass over a task.  The matrix does not depend on it but
            for rounding, except with ``BatchMeans``.

    Raises:
        ValueError: the batch size is below 1, or the estimator is ``BatchMeans``, and the structure
            is not diagonal.
    """

    likelihood: Likelihood = field(default_factory=Categorical)
    estimator: Estimator = field(default_factory=Exact)
    structure: Structure[Any] = field(default_factory=Diagonal)
    batch_size: int = 1000

    def __post_init__(self) -> None:
        """Check the batch size, and that estimator and structure fit together."""
        check_count(self.batch_size, "batch_size")
        if isinstance(self.estimator, BatchMeans) and self.structure != Diagonal():
            raise ValueError(
                "fisher/structure must be diagonal with fisher/estimator=batch_means, got "
                f"{self.structure}."
            )

    @property
    def request(self) -> Structure[Any]:
        """The structure for the pass over the data."""
        return BatchMeanGradients() if isinstance(self.estimator, BatchMeans) else self.structure
