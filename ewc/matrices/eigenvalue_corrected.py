r"""The eigenvalue-corrected Kronecker structure (EKFAC)."""

import torch

from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.matrix import FisherMatrix


class EigenvalueCorrectedFisher(BlockDiagonalFisher):
    r"""EKFAC: the Kronecker eigenvectors of each layer with the best eigenvalues.

    Per layer

    .. math:: (Q_G \otimes Q_A)\, \mathrm{diag}(S)\, (Q_G \otimes Q_A)^\top, \qquad
              S = \tfrac1N \sum_{n,k} (Q_G^\top V_{kn} Q_A)^2

    with the eigenvectors of the factors of :class:`~ewc.matrices.kronecker.KroneckerFisher`.
    :math:`S` holds the second moments of the gradients along them (George et al. 2018,
    arXiv:1806.03884, equation 6).  No other eigenvalues give a better approximation with these
    eigenvectors, and the trace is exact.

    It takes two passes over the data.  Memory :math:`o^2 + i^2 + o i` per layer; ``matvec`` and
    ``solve`` take :math:`2 o i (o + i)` operations.  Layers without a Kronecker form have their
    exact block, as in :class:`~ewc.matrices.kronecker.KroneckerFisher`.
    """

    form = EigenvalueCorrectedProduct

    def nearest(self) -> "EigenvalueCorrectedFisher":
        """The nearest matrix with the eigenvectors of the last term, per layer.

        It is nearest in the Frobenius norm, and has the same trace.
        """
        blocks = [_nearest(block) for block in self.blocks]
        return EigenvalueCorrectedFisher(blocks, self.shapes, self.num_examples)


def _nearest(block: FisherMatrix) -> FisherMatrix:
    """The nearest block with one eigenbasis; a block of another kind stays as it is."""
    corrected = [term for term in block.terms if isinstance(term, EigenvalueCorrectedProduct)]
    if len(corrected) < len(block.terms):
        return block
    basis = corrected[-1]
    spectrum = torch.stack([term.seen_in(basis) for term in corrected]).sum(0)
    return EigenvalueCorrectedProduct(
        basis.weights, basis.outputs, basis.inputs, spectrum, block.num_examples
    )
