r"""Estimators of the expectation over targets, each a choice of score vectors.

| estimator | vectors :math:`s_{kn}` | K |
|---|---|---|
| :class:`Exact` | any exact factor of :math:`E_y[s s^\top]` | rank, ``c - 1`` for classes |
| :class:`MonteCarlo` | :math:`s(y) / \sqrt{S}`, ``y`` drawn from the model | ``S`` |
| :class:`Empirical` | :math:`s(y_n)`, the observed target | 1 |

A score vector reaches all positions of its example.  With ``t`` positions the exact factor has
``t`` times as many vectors; a sample is one vector, with a target drawn at every position.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ewc.checks import check_count, check_instance, check_whole, is_number
from ewc.likelihoods import Likelihood
from ewc.pullback.losses import Loss


class Estimator(ABC):
    """A choice of score vectors for every example."""

    @abstractmethod
    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        generator: torch.Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The score vectors to pull back through the network.

        Args:
            likelihood: the meaning of the outputs.
            outputs: shape ``[n, ...]``.
            targets: the observed targets, unchecked if the estimator does not use them; then
                ``None`` if there are none.
            generator: the source of randomness, seeded with :attr:`seed` once per pass.
            weights: how often observations count, in a shape that multiplies ``outputs``
                (:meth:`~ewc.Likelihood.combined_weights`); once if ``None``.

        Returns:
            Shape ``[k, n, ...]``.
        """

    def bytes_per_example(self, outputs: Tensor) -> int:
        """The bytes for the vectors of one example, if they grow faster than the outputs.

        Args:
            outputs: the outputs of a set of examples, ``[n, ...]``.
        """
        return 0

    @property
    def uses_targets(self) -> bool:
        """Whether the estimator uses the observed targets; they must then fit the likelihood."""
        return True

    @property
    def loss(self) -> Loss | None:
        """The loss in place of the likelihood; the outputs are then its values ``[n, 1]``."""
        return None

    @property
    def varies(self) -> bool:
        """Whether the number of vectors differs between examples."""
        return False

    def vectors_needed(
        self, likelihood: Likelihood, outputs: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The number of vectors of each example, for an estimator that :attr:`varies`.

        Examples that need equally many vectors are processed together.

        Args:
            likelihood: the meaning of the outputs.
            outputs: shape ``[n, ...]``.
            weights: as for :meth:`score_vectors`.

        Returns:
            Shape ``[n]``.
        """
        raise NotImplementedError

    @property
    def seed(self) -> int:
        """The seed of the pass's generator; deterministic estimators do not use it."""
        return 0


@dataclass(frozen=True)
class Exact(Estimator):
    r"""The expectation over targets of the model, in closed form.

    :math:`F = \frac1N \sum_n J_n^\top E_{y \sim p(\cdot \mid x_n)}[s s^\top] J_n`
    (Kunstner et al. 2019, arXiv:1905.12558, equation 3).

    With a tolerance :math:`\epsilon`, the shortest score vectors of each example are dropped.
    Their squared lengths sum to at most the fraction :math:`\epsilon` of the trace of
    :math:`E_y[s s^\top]`, the Fisher information of the outputs.  The result never exceeds
    ``F``.  The missing trace is at most
    :math:`\epsilon \frac1N \sum_n \|J_n\|^2 \mathrm{tr}\, E_y[s s^\top]`, with the spectral
    norm.  A trained network predicts most examples with high probability.  These need one or
    two vectors.

    Attributes:
        tolerance: :math:`\epsilon`, from 0 (all vectors) to below 1.

    Raises:
        ValueError: the tolerance is outside this range.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        """Check the tolerance."""
        if not (is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(f"tolerance must lie in [0, 1), got {self.tolerance!r}.")

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        generator: torch.Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        factor = weighted(likelihood.fisher_factor(outputs), weights)
        if self.tolerance == 0 or factor.shape[0] == 0:
            return factor
        flat = _flat(factor)
        squares, order = flat.square().sum(2).sort(0, descending=True)
        negligible = self._negligible(squares)
        # One at least: K-FAC's input factor has the examples without vectors too.
        kept = max(1, int((~negligible).sum(0).max()))
        index = order[:kept, :, None].expand(-1, -1, flat.shape[2])
        vectors = flat.gather(0, index) * ~negligible[:kept, :, None]
        return vectors.view(kept, *outputs.shape)

    def bytes_per_example(self, outputs: Tensor) -> int:
        # The factor of c vectors, its intermediate results, and the vectors that are kept.
        return 8 * outputs[0].numel() ** 2 * outputs.element_size()

    @property
    def uses_targets(self) -> bool:
        return False

    @property
    def varies(self) -> bool:
        return self.tolerance > 0

    def vectors_needed(
        self, likelihood: Likelihood, outputs: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        factor = _flat(weighted(likelihood.fisher_factor(outputs), weights))
        squares = factor.square().sum(2).sort(0, descending=True).values
        return (~self._negligible(squares)).sum(0)

    def _negligible(self, squares: Tensor) -> Tensor:
        """Which of the vectors, sorted by decreasing length, are dropped, ``[k, n]``."""
        remaining = squares.flip(0).cumsum(0).flip(0)
        return remaining <= self.tolerance * remaining[:1]


@dataclass(frozen=True)
class MonteCarlo(Estimator):
    r"""The expectation over targets of the model, by sampling; it is unbiased.

    :math:`F \approx \frac1{NS} \sum_n \sum_s J_n^\top s(y_{ns}) s(y_{ns})^\top J_n` with
    :math:`y_{ns} \sim p(\cdot \mid x_n)`.  The error falls as :math:`1 / \sqrt{NS}`.

    Attributes:
        num_samples: :math:`S`, the number of targets drawn per example.
        seed: the seed; the same seed gives the same matrix, whatever the batch size.

    Raises:
        ValueError: ``num_samples`` is not a whole number, 1 or more, or the seed is not whole.
    """

    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the number of samples and the seed."""
        check_count(self.num_samples, "num_samples")
        check_whole(self.seed, "seed")

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        generator: torch.Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        draws = likelihood.sample(outputs, self.num_samples, generator)
        scores = [likelihood.score(outputs, draw) for draw in draws]
        return weighted(torch.stack(scores) / math.sqrt(self.num_samples), weights)

    @property
    def uses_targets(self) -> bool:
        return False


@dataclass(frozen=True)
class Empirical(Estimator):
    r"""The observed targets in place of the expectation: *not* the Fisher information.

    :math:`\frac1N \sum_n J_n^\top s(y_n) s(y_n)^\top J_n`: the uncentred covariance of the
    per-example gradients.  It vanishes where the network fits its data.  Kunstner et al.
    2019, arXiv:1905.12558, describe when that misleads.

    With a loss the matrix is :math:`\frac1N \sum_n \nabla \ell_n \nabla \ell_n^\top`, and the
    likelihood is not used.

    Attributes:
        loss: ``loss(model, batch)`` returns the negative log-likelihoods :math:`\ell_n` of the
            examples of a batch, ``[n]``, in nats.  It calls ``model`` in any way and as often
            as it likes.  ``batch`` is a batch of the data, or some of its examples: tensors are
            cut along their first dimension, and lists of items by items, in dicts, lists and
            tuples.

    Raises:
        TypeError: the loss is not a function.
    """

    loss: Loss | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the loss."""
        if isinstance(self.loss, nn.Module) or not (self.loss is None or callable(self.loss)):
            raise TypeError(
                f"loss must be a function (model, batch) -> losses [n], or None, got {self.loss!r}."
            )

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        generator: torch.Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        if self.loss is not None:
            return weighted(-torch.ones_like(outputs)[None], weights)
        assert targets is not None
        return weighted(likelihood.score(outputs, targets)[None], weights)

    @property
    def uses_targets(self) -> bool:
        return self.loss is None


def weighted(vectors: Tensor, weights: Tensor | None) -> Tensor:
    r"""Score vectors times :math:`\sqrt w`, so that their outer products count :math:`w` times.

    Args:
        vectors: ``[k, n, ...]``.
        weights: in a shape that multiplies ``[n, ...]``; 1 if ``None``.
    """
    return vectors if weights is None else vectors * weights.sqrt()


def _flat(vectors: Tensor) -> Tensor:
    """Vectors ``[k, n, ...]`` as ``[k, n, c]``."""
    return vectors.reshape(*vectors.shape[:2], vectors.shape[2:].numel())


def check_no_loss(estimator: Estimator, place: str) -> None:
    """Check that an estimator rests on the likelihood.

    Raises:
        ValueError: it has a loss of its own.
    """
    if estimator.loss is not None:
        raise ValueError(f"{place} needs a likelihood: estimator must have no loss.")


def check_estimator(value: Estimator) -> None:
    """Check that a value is an estimator.

    Raises:
        TypeError: it is something else.
    """
    check_instance(value, Estimator, "estimator", "an Estimator instance such as Exact()")
