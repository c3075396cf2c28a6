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

The log-likelihood of an example is the sum over its positions.  An observation, the target of one
position, may have a weight :math:`w`.  It then counts :math:`w` times:

.. math:: F = \frac1N \sum_n \sum_t w_{nt} \, E_y[s_{nt} s_{nt}^\top]

A weight of 0 leaves the position out.  The example still counts in ``N``.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ewc.checks import check_instance
from ewc.linalg.devices import sizes_for


class Likelihood(ABC):
    r"""The density :math:`p(y \mid f)` of a target given a network's outputs."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\sum_t w_{nt} \log p(y_{nt} \mid f_{nt})` in nats, shape ``[n]``.

        The sum is over the positions of an example, with the :meth:`weights`.
        """

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`s_{nt} = \partial \log p(y_{nt} \mid f_{nt}) / \partial f_{nt}`, as ``outputs``.

        Without the weights.  Where a weight is 0, the score may be any finite number.
        """

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
    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r"""The Kullback-Leibler divergences in nats, shape ``[n]``.

        :math:`\sum_t w_{nt} KL(p(\cdot \mid f_{nt}) \| p(\cdot \mid f'_{nt}))`

        Args:
            outputs: :math:`f`.
            other: :math:`f'`.
            weights: :math:`w` as :meth:`combined_weights` returns them; 1 if ``None``.
        """

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that ``targets`` can belong to ``outputs``.

        Raises:
            ValueError: the targets have the wrong shape, or an impossible value.
        """
        self.check_target_shape(outputs, targets)
        wrong = self.impossible(outputs, targets)
        if wrong is not None and (odd := targets[wrong]).numel():
            raise ValueError(self._refusal(outputs, odd[0]))

    def check_target_shape(self, outputs: Tensor, targets: Tensor) -> None:
        """Check the shape and the type of ``targets``, without reading their values.

        Raises:
            ValueError: the targets have another shape or type.
        """
        return

    def impossible(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The targets with an impossible value, as a mask of their shape.

        ``None`` if only :meth:`check_targets` knows.  It is then called for every batch, which
        waits for an accelerator.
        """
        return None

    def _refusal(self, outputs: Tensor, value: Tensor) -> str:
        """What to say of an impossible value."""
        return f"A target of {self} has the impossible value {value.item()}."

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that the likelihood has a meaning for outputs of this shape.

        Raises:
            ValueError: it has none.
        """
        return

    def channel_dim(self, outputs: Tensor) -> int | None:
        """The dimension with the outputs of one position; ``None`` if there is one output."""
        return (None, None, 1, 2)[outputs.dim()] if outputs.dim() < 4 else 1

    def needs_targets(self, outputs: Tensor) -> bool:
        """Whether the weights depend on the targets, which must then fit for every estimator."""
        return False

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """How often the observation of each position counts.

        Returns:
            Shape ``[n, *positions]``: that of ``outputs`` without its channels.  ``None`` if all
            count once.
        """
        return None

    def moved_weights(self, weights: Tensor) -> Tensor:
        """Weights that belong to targets ``[n, *positions]``, as those of the outputs."""
        return weights

    def combined_weights(
        self, outputs: Tensor, targets: Tensor | None, given: Tensor | None = None
    ) -> Tensor | None:
        """The product of :meth:`weights` and the weights that come with the data.

        Args:
            outputs: shape ``[n, ...]``.
            targets: the observed targets; ``None`` if there are none.
            given: the weights of examples, ``[n]``, or of positions, ``[n, *positions]``.

        Returns:
            The outputs' shape, with a size of 1 where all entries have the same weight.  ``None``
            if all observations count once.

        Raises:
            ValueError: the given weights have another shape.
        """
        combined: Tensor | None = None
        of_targets = None if targets is None else self.weights(outputs, targets)
        # Mostly all labels count.  An accelerator would wait for the answer.
        if of_targets is not None and not sizes_for(of_targets.device).waits:
            of_targets = None if bool((of_targets == 1).all()) else of_targets
        given = None if given is None else self.moved_weights(given)
        for weights in (of_targets, given):
            if weights is not None:
                spread = self._along_outputs(weights, outputs)
                combined = spread if combined is None else combined * spread
        return combined

    def _along_outputs(self, weights: Tensor, outputs: Tensor) -> Tensor:
        """Weights ``[n]`` or ``[n, *positions]`` in a shape that multiplies ``outputs``."""
        channel = self.channel_dim(outputs)
        spread = list(outputs.shape)
        if channel is not None:
            spread[channel] = 1
        positions = [size for dim, size in enumerate(outputs.shape) if dim != channel]
        if weights.shape == outputs.shape[:1]:
            spread = [len(outputs)] + [1] * (outputs.dim() - 1)
        elif list(weights.shape) != positions:
            allowed = f"[{len(outputs)}]" + f" or {positions}" * (len(positions) > 1)
            raise ValueError(
                f"Weights must have shape {allowed}, one for each example or position, got "
                f"{list(weights.shape)}."
            )
        return weights.to(outputs.dtype).view(spread)


def summed(entries: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum over all entries of an example, with their weights: ``[n]`` for ``[n, ...]``."""
    entries = entries if weights is None else entries * weights
    return entries.flatten(1).sum(1) if entries.dim() > 1 else entries


def check_likelihood(value: Likelihood) -> None:
    """Check that an argument is a :class:`Likelihood`.

    Raises:
        TypeError: the argument is of another type.
    """
    check_instance(value, Likelihood, "likelihood", "a Likelihood instance such as Categorical()")
