r"""Likelihoods :math:`p(y \mid f)`: what a network's outputs mean.

The Fisher information of a network needs two things of a likelihood.  The *score* is
:math:`s(y) = \partial \log p(y \mid f) / \partial f`.  The score vectors have outer products
that sum to the Fisher information of the outputs,
:math:`E_{y \sim p(\cdot \mid f)}[s(y) s(y)^\top]`.

Outputs ``f`` have shape ``[n, ...]`` for ``n`` examples.  An example is what is independent of
the rest: an image, a sequence, a graph.  Its outputs may have positions:

| outputs | an example has | channels |
|---|---|---|
| ``[n]`` | one output | none |
| ``[n, c]`` | ``c`` outputs | the last dimension |
| ``[n, t, c]`` | ``c`` outputs at ``t`` positions (tokens) | the last dimension |
| ``[n, c, h, w]`` | ``c`` outputs at ``h w`` positions (pixels) | dimension 1 |

The log-likelihood of an example is the sum over its positions.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ewc.checks import check_instance


class Likelihood(ABC):
    r"""The density :math:`p(y \mid f)` of a target given a network's outputs."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\log p(y_n \mid f_n)` in nats, shape ``[n]``: the sum over positions."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`s_n = \partial \log p(y_n \mid f_n) / \partial f_n`, shape of ``outputs``."""

    @abstractmethod
    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r"""Vectors :math:`s_{kn}` with :math:`\sum_k s_{kn} s_{kn}^\top = E_y[s s^\top]`.

        Returns:
            Shape ``[k, *outputs.shape]``, with as few vectors as the rank of the matrix allows.
        """

    @abstractmethod
    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        r"""Targets drawn from :math:`p(\cdot \mid f_n)`, shape ``[num_samples, n, ...]``.

        Random numbers are drawn example by example from ``generator``, a CPU generator.
        Other batches of the same data therefore draw the same targets.
        """

    @abstractmethod
    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        r""":math:`KL(p(\cdot \mid f_n) \| p(\cdot \mid f'_n))` in nats, shape ``[n]``."""

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that ``targets`` can belong to ``outputs``.

        Raises:
            ValueError: the targets have the wrong shape, or an impossible value.
        """

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that the likelihood has a meaning for outputs of this shape.

        Raises:
            ValueError: it has none.
        """


def summed(entries: Tensor) -> Tensor:
    """The sum over all entries of an example: ``[n]`` for ``[n, ...]``."""
    return entries.flatten(1).sum(1) if entries.dim() > 1 else entries


def check_likelihood(value: Likelihood) -> None:
    """Check that an argument is a :class:`Likelihood`.

    Raises:
        TypeError: the argument is of another type.
    """
    check_instance(value, Likelihood, "likelihood", "a Likelihood instance such as Categorical()")
