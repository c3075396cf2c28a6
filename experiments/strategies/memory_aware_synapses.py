"""Memory Aware Synapses (Aljundi et al. 2018): importance from the outputs' squared norm.

Avalanche's own ``MASPlugin`` differs from the paper: it takes gradients of batch means where
the paper has single examples.
"""

from dataclasses import dataclass

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from ewc import DiagonalFisher, Empirical, Likelihood, Online
from ewc.fisher.diagonal import DiagonalSum
from ewc.fisher.outer import OuterProducts
from ewc.fisher.pullback import Chunk, Pullback, slices
from ewc.parameters import Parameters
from ewc.plugin import EWCPlugin
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Penalised


@dataclass(frozen=True)
class MAS(Penalised):
    """Memory Aware Synapses: gradients of the squared output norm (Aljundi et al. 2018)."""

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """EWC's plugin with this importance."""
        return [memory_aware_synapses(self.strength)]


def memory_aware_synapses(strength: float) -> EWCPlugin:
    r"""The penalty :math:`\lambda / 2 \cdot \sum_t \Omega_t (\theta - a)^2` of Aljundi et al. 2018.

    :math:`\Omega_t = \frac1N \sum_n |\partial |f(x_n)|^2 / \partial \theta|`
    (arXiv:1711.09601, equation 3), over single examples.

    Args:
        strength: :math:`\lambda`.
    """
    return EWCPlugin(
        strength,
        likelihood=SquaredNorm(),
        estimator=Empirical(),
        structure=AbsoluteGradients,
        consolidation=Online(),
    )


@dataclass(frozen=True)
class SquaredNorm(Likelihood):
    r"""Scores that are the gradient of :math:`|f(x)|^2`, whatever the target.

    With :class:`~ewc.Empirical` the pulled-back vectors are then the gradients of the
    squared output norm, which Memory Aware Synapses asks for.
    """

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The vector :math:`2 f`."""
        return 2 * outputs

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Any target will do: it is not looked at."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared norm itself."""
        return outputs.square().sum(1)

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        """None: there is no distribution.

        Raises:
            TypeError: always.
        """
        raise TypeError("SquaredNorm is no distribution: use it with Empirical().")

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """None: there is no distribution.

        Raises:
            TypeError: always.
        """
        raise TypeError("SquaredNorm is no distribution: use it with Empirical().")

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        """None: there is no distribution.

        Raises:
            TypeError: always.
        """
        raise TypeError("SquaredNorm is no distribution: use it with Empirical().")


class AbsoluteGradients(DiagonalFisher):
    r"""The mean of :math:`|v_n|`, entry by entry, over single examples (Aljundi et al. 2018)."""

    @classmethod
    def accumulator(cls, parameters: Parameters) -> "AbsoluteSum":
        """An empty sum."""
        return AbsoluteSum(parameters)


class AbsoluteSum(DiagonalSum):
    r"""The running :math:`\sum_{n,k} |v_{kn}|`."""

    def add(self, chunk: Chunk) -> None:
        """Add the absolute values of one chunk."""
        for pullbacks in chunk.pullbacks():
            for pullback in pullbacks:
                _add_absolute(pullback, self.total)


def _add_absolute(pullback: Pullback, total: Parameters) -> None:
    for part in slices(pullback.num_examples, pullback.bytes_per_example(), pullback.memory):
        if isinstance(pullback, OuterProducts) and pullback.positions == 1:
            # Of one outer product the absolute values are the product of those.
            a, g = (tensor.abs() for tensor in pullback.factors(part))
            matrix = torch.einsum("kngto,ngti->goi", g, a)
            total[pullback.weight] += pullback.layout.to_parameter(matrix)
            if pullback.bias is not None:
                total[pullback.bias] += g.sum((0, 1, 3)).flatten()
            continue
        for name, vectors in pullback.per_example(part).items():
            total[name] += vectors.abs().sum((0, 1))
