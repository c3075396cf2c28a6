r"""The share of single examples in the curvature: their leverages in a fit.

With :math:`U_i` the ``K`` pulled-back score vectors of example ``i``, so that
:math:`U_i U_i^\top` is its Fisher information, :math:`B = (F + \delta I)^{-1}` and
:math:`H_i = U_i^\top B U_i / N`, the matrix without the example has the inverse

.. math:: \big(B^{-1} - \tfrac1N U_i U_i^\top\big)^{-1}
          = B + \tfrac1N B U_i (I - H_i)^{-1} U_i^\top B

(Woodbury).  The eigenvalues of :math:`H_i` are leverages, from 0 to below 1.  A leverage is the
example's share of the information along a direction in its outputs (Pregibon 1981,
doi:10.1214/aos/1176345513).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc.fisher.estimators import weighted
from ewc.linalg.tiles import DEFAULT_MEMORY, slices
from ewc.matrices.matrix import DampedInverse, FisherMatrix
from ewc.parameters import Parameters
from ewc.pullback.per_example import PerExample
from ewc.statistics.network import NetworkFunction


@dataclass(frozen=True)
class ExampleVectors:
    """The gradients and score vectors of some examples, as flat vectors.

    Attributes:
        gradients: the gradients of the losses, ``[n, p]``.
        vectors: the pulled-back score vectors :math:`U_i`, ``[n, k, p]``.
    """

    gradients: Tensor
    vectors: Tensor

    def moves(self, inverse: DampedInverse, fisher: FisherMatrix) -> Tensor:
        r"""Newton's steps :math:`(B^{-1} - \frac1N U_i U_i^\top)^{-1} \nabla \ell_i`, ``[n, p]``.

        Args:
            inverse: :math:`B`.
            fisher: the matrix :math:`F`.

        Raises:
            torch.linalg.LinAlgError: a leverage is not below 1.
        """
        n, k, p = self.vectors.shape
        first = inverse.rows(self.gradients, fisher.shapes)
        solved = inverse.rows(self.vectors.reshape(n * k, p), fisher.shapes).view(n, k, p)
        leverages = solved @ self.vectors.mT / fisher.num_examples
        rest = torch.eye(k, dtype=leverages.dtype, device=leverages.device) - leverages
        factor, failed = torch.linalg.cholesky_ex(rest)
        if bool(failed.any()):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                "An example has a leverage of 1 or more: fisher must be an exact matrix over data "
                "with this example, or damping larger."
            )
        along = solved @ self.gradients[:, :, None] / fisher.num_examples
        return first + (torch.cholesky_solve(along, factor).mT @ solved)[:, 0]


def example_vectors(
    network: NetworkFunction, data: Iterable[Any], fisher: FisherMatrix
) -> Iterator[ExampleVectors]:
    """The gradients and vectors of all examples, as many at a time as fit into memory."""
    likelihood = network.likelihood
    vectorises: dict[tuple[str, ...], bool] = {}
    with network.evaluating():
        for arguments, targets in network.batches(data):
            with torch.no_grad():
                outputs = network.outputs(network.parameters, arguments)
            weights = likelihood.combined_weights(outputs, targets)
            losses = -likelihood.score(outputs, targets)[None]
            losses = losses if weights is None else weights * losses
            pullback = PerExample(
                network.model,
                fisher.shapes,
                arguments,
                torch.cat([losses, weighted(likelihood.fisher_factor(outputs), weights)]),
                memory=DEFAULT_MEMORY,
                vectorises=vectorises,
            )
            # Twice: their solutions take as much as the vectors.
            for chunk in slices(len(targets), 2 * pullback.bytes_per_example(), pullback.memory):
                rows = _flat(pullback.per_example(chunk), fisher)
                yield ExampleVectors(rows[:, 0], rows[:, 1:])


def _flat(vectors: Parameters, fisher: FisherMatrix) -> Tensor:
    """Vectors ``[k, n, ...]`` by name as ``[n, k, p]`` in the matrix's order and type."""
    rows = torch.cat([vectors[name].flatten(2) for name in fisher.shapes], 2)
    return rows.transpose(0, 1).to(fisher.dtype).contiguous()
