r"""Estimators: how the expectation over targets is taken, as a choice of score vectors.

| estimator | vectors :math:`s_{kn}` | K |
|---|---|---|
| :class:`Exact` | any exact factor of :math:`E_y[s s^\top]` | rank, ``c - 1`` for classes |
| :class:`MonteCarlo` | :math:`s(y) / \sqrt{S}`, ``y`` drawn from the model | ``S`` |
| :class:`Empirical` | :math:`s(y_n)`, the observed target | 1 |
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.likelihoods import Likelihood


class Estimator(ABC):
    """A choice of score vectors for every example."""

    @abstractmethod
    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The score vectors to pull back through the network.

        Args:
            likelihood: the meaning of the outputs.
            outputs: shape ``[n, c]``.
            targets: the observed targets.
            generator: the source of randomness, seeded with :attr:`seed` once a pass.

        Returns:
            Shape ``[k, n, c]``.
        """

    @property
    def seed(self) -> int:
        """The seed of the pass's generator; estimators without chance do not use it."""
        return 0


@dataclass(frozen=True)
class Exact(Estimator):
    r"""The expectation over the model's own targets, in closed form.

    :math:`F = \frac1N \sum_n J_n^\top E_{y \sim p(\cdot \mid x_n)}[s s^\top] J_n`
    (Kunstner et al. 2019, arXiv:1905.12558, equation 3).
    """

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The likelihood's own exact factor, shape ``[k, n, c]``."""
        return likelihood.fisher_factor(outputs)


@dataclass(frozen=True)
class MonteCarlo(Estimator):
    r"""The expectation over the model's own targets, by sampling: unbiased.

    :math:`F \approx \frac1{NS} \sum_n \sum_s J_n^\top s(y_{ns}) s(y_{ns})^\top J_n` with
    :math:`y_{ns} \sim p(\cdot \mid x_n)`.  The error falls as :math:`1 / \sqrt{NS}`.

    Attributes:
        num_samples: :math:`S`, the targets drawn for each example.
        seed: the seed; the same seed gives the same matrix, whatever the batch size.

    Raises:
        ValueError: ``num_samples`` is below 1.
    """

    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the number of samples."""
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ValueError(
                f"num_samples is {self.num_samples}: it must be a whole number above 0."
            )

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        r"""Scores of drawn targets over :math:`\sqrt{S}`, shape ``[num_samples, n, c]``."""
        draws = likelihood.sample(outputs, self.num_samples, generator)
        scores = [likelihood.score(outputs, draw) for draw in draws]
        vectors: Tensor = torch.stack(scores) / math.sqrt(self.num_samples)
        return vectors


@dataclass(frozen=True)
class Empirical(Estimator):
    r"""The observed targets in place of the expectation: *not* the Fisher information.

    :math:`\frac1N \sum_n J_n^\top s(y_n) s(y_n)^\top J_n`: the uncentred covariance of the
    per-example gradients.  It vanishes where the network fits its data; see Kunstner et
    al. 2019, arXiv:1905.12558, for when that misleads.
    """

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The scores of the observed targets, shape ``[1, n, c]``."""
        return likelihood.score(outputs, targets)[None]
