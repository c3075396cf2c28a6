"""The information of gradients that are averaged before they are squared."""

from dataclasses import dataclass

import torch

from ewc import DiagonalFisher, Empirical
from ewc.fisher import Structure
from ewc.fisher.structures.diagonal import DiagonalAccumulator
from ewc.parameters import Parameters
from ewc.pullback.pullback import Chunk


@dataclass(frozen=True)
class BatchMeans(Empirical):
    """Observed labels, whose gradients are averaged over a batch before they are squared."""


@dataclass(frozen=True)
class BatchMeanGradients(Structure[DiagonalFisher]):
    r"""The mean over batches of the squared mean gradient, :math:`(\frac1B \sum_n v_n)^2`.

    Avalanche's ``EWCPlugin`` and many others use it as the empirical Fisher; it shrinks like
    :math:`1/B`.  Use it with :class:`~ewc.Empirical`.  A batch is one of the pass over the data
    (``fisher.batch_size``), or a piece of one that does not fit into memory.
    """

    has_units = True

    def accumulator(self, parameters: Parameters) -> "BatchMeanAccumulator":
        """An empty sum."""
        return BatchMeanAccumulator(parameters)


class BatchMeanAccumulator(DiagonalAccumulator):
    r"""The running :math:`\sum_b B_b (\frac{1}{B_b} \sum_{n \in b} v_n)^2`."""

    def add(self, chunk: Chunk) -> None:
        """Add the squared mean gradient of one batch, which a chunk is."""
        gradient = {name: torch.zeros_like(total)[None] for name, total in self.total.items()}
        vectors, examples = chunk.scores.shape[:2]
        ones = chunk.scores.new_ones(vectors, examples, 1)
        for pullbacks in chunk.pullbacks():
            for pullback in pullbacks:
                pullback.add_combinations(ones, gradient)
        for name, total in self.total.items():
            total.addcmul_(gradient[name][0], gradient[name][0], value=1 / examples)
