r"""Memory Aware Synapses (Aljundi et al. 2018): importance from the outputs' squared norm.

:math:`\Omega = \frac1N \sum_n |\partial |f(x_n)|^2 / \partial \theta|` (arXiv:1711.09601,
equation 3) is taken like the Fisher information, with other score vectors and absolute values
in place of squares.  Avalanche's ``MASPlugin`` differs from the paper: it takes gradients of
batch means, the paper of single examples.
"""

from dataclasses import dataclass

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from ewc import DiagonalFisher, Likelihood, Online
from ewc.fisher import Estimator, Structure
from ewc.fisher.structures.diagonal import DiagonalAccumulator
from ewc.linalg.tiles import slices
from ewc.parameters import Parameters
from ewc.plugin import EWCPlugin
from ewc.pullback.outer import OuterProducts
from ewc.pullback.pullback import Chunk, Pullback
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Penalised


@dataclass(frozen=True)
class MAS(Penalised):
    """The penalty of EWC with this importance, summed over the tasks."""

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """EWC's plugin, which does not use ``fisher`` here."""
        plugin = EWCPlugin(
            self.strength,
            estimator=OutputNorm(),
            structure=AbsoluteGradients(),
            consolidation=Online(),
        )
        return [plugin]


@dataclass(frozen=True)
class OutputNorm(Estimator):
    r"""One vector per example, the gradient of :math:`|f(x)|^2`, whatever the target."""

    def score_vectors(
        self,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: Tensor | None,
        generator: torch.Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The vector :math:`2 f`, shape ``[1, n, c]``."""
        return 2 * outputs[None]

    @property
    def uses_targets(self) -> bool:
        """Always False: the norm does not depend on targets."""
        return False


@dataclass(frozen=True)
class AbsoluteGradients(Structure[DiagonalFisher]):
    r"""The mean of :math:`|v_n|`, entry by entry, over single examples."""

    def accumulator(self, parameters: Parameters) -> "AbsoluteAccumulator":
        """An empty sum."""
        return AbsoluteAccumulator(parameters)


class AbsoluteAccumulator(DiagonalAccumulator):
    r"""The running :math:`\sum_{n,k} |v_{kn}|`."""

    def add(self, chunk: Chunk) -> None:
        """Add the absolute values of one chunk."""
        for pullbacks in chunk.pullbacks():
            for pullback in pullbacks:
                _add_absolute(pullback, self.total)


def _add_absolute(pullback: Pullback, total: Parameters) -> None:
    for rows in slices(pullback.num_examples, pullback.bytes_per_example(), pullback.memory):
        if isinstance(pullback, OuterProducts) and pullback.positions == 1:
            # The absolute values of an outer product are the product of absolute values.
            a, g = (factor.abs() for factor in pullback.factors(rows))
            matrix = torch.einsum("kngto,ngti->goi", g, a)
            total[pullback.weight] += pullback.layout.to_parameter(matrix)
            if pullback.bias is not None:
                total[pullback.bias] += g.sum((0, 1, 3)).flatten()
            continue
        for name, vectors in pullback.per_example(rows).items():
            total[name] += vectors.abs().sum((0, 1))
