r"""The Kronecker-factored Fisher information (K-FAC)."""

from collections.abc import Sequence

import torch

from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import FisherMatrix


class KroneckerFisher(BlockDiagonalFisher):
    r"""K-FAC: :math:`F_l \approx G_l \otimes A_l` per layer (Martens & Grosse 2015).

    :math:`G = \frac1N \sum_{n,k,t} g g^\top` are the second moments of the gradients with
    respect to the layer's outputs, :math:`A = \frac1{N T} \sum_{n,t} a a^\top` those of its
    inputs with a 1 appended for the bias (arXiv:1503.05671, equation 1).  A weight may be used at
    ``T`` positions: convolutions, sequences, repeated calls.  Each position then counts as an
    example: K-FAC-expand (Eschenhagen et al. 2023, arXiv:2311.00636, equation 22).  With
    ``Kronecker(reduce=True)`` the inputs are averaged and the gradients summed over positions
    first.  This is K-FAC-reduce (equation 23), exact where a linear network averages over
    positions.

    The matrix is exact for a deep linear network with a Gaussian likelihood, and for a single
    example.  Otherwise it treats a layer's inputs and gradients as independent.  A layer without
    this form (a normalisation, a weight tied to an embedding, an operation without a rule) has
    its exact dense block instead, and printing names it.  Where that block is above 512 MiB
    (11,585 parameters in single precision) the layer has its exact diagonal, with a warning.

    ``T`` is counted per example, so that the matrix does not depend on the batches.  Where only
    some examples use a layer (experts, heads), :math:`G` is the mean over these examples, and the
    block is scaled by their fraction.

    Memory :math:`o^2 + i^2` per layer.  ``matvec`` takes :math:`o i (o + i)` operations;
    ``solve``, ``logdet`` and ``eigenvalues`` take :math:`o^3 + i^3` once.  A sum of two is exact
    and lazy; :meth:`nearest` makes one product of it.
    """

    form = KroneckerProduct

    def nearest(self) -> "KroneckerFisher":
        return nearest_kronecker(self)[0]


def nearest_kronecker(fisher: FisherMatrix) -> tuple[KroneckerFisher, float]:
    r"""The Kronecker matrix nearest to a sum of Kronecker matrices, and the error.

    Per layer :math:`G` and :math:`A` minimise
    :math:`\| \sum_t G_t \otimes A_t - G \otimes A \|_F`.  They are the leading singular vectors
    of :math:`\sum_t \mathrm{vec}(G_t) \mathrm{vec}(A_t)^\top` (Van Loan & Pitsianis 1993), which
    combine the :math:`G_t` and the :math:`A_t` with non-negative weights.  The result is therefore
    positive semi-definite.  Exact blocks are added exactly.

    Args:
        fisher: a :class:`KroneckerFisher`, or the sum of several.

    Returns:
        The matrix, and the error :math:`\| \cdot \|_F / \| \sum_t F_t \|_F` over all layers.

    Raises:
        ValueError: ``fisher`` is not a sum of Kronecker matrices over the same layers.
    """
    if not isinstance(fisher, BlockDiagonalFisher):
        raise ValueError(  # noqa: TRY004 - the sum's terms are at fault, not its type
            "nearest_kronecker needs a sum of Kronecker matrices over the same layers, got a "
            f"{type(fisher).__name__}."
        )
    blocks: list[FisherMatrix] = []
    error, total = 0.0, 0.0
    for block in fisher.blocks:
        terms = block.terms
        if not all(isinstance(term, KroneckerProduct) for term in terms):
            if len(terms) > 1 or isinstance(block, EigenvalueCorrectedProduct):
                raise ValueError(
                    "nearest_kronecker needs a sum of Kronecker products in every layer, got a "
                    f"{type(block).__name__} for {', '.join(block.shapes)}."
                )
            blocks.append(block)
            continue
        nearest, squared, norm = _nearest(terms)  # type: ignore[arg-type]
        blocks.append(nearest)
        error, total = error + squared, total + norm
    result = KroneckerFisher(blocks, fisher.shapes, fisher.num_examples)
    return result, (error / total) ** 0.5 if total > 0 else 0.0


def _nearest(terms: Sequence[KroneckerProduct]) -> tuple[KroneckerProduct, float, float]:
    """The nearest product of one layer, the squared error, and the squared norm of the sum."""
    weights = terms[0].weights
    examples = sum(term.num_examples for term in terms)
    outputs = torch.stack([term.outputs for term in terms])
    inputs = torch.stack([term.inputs for term in terms])
    # Inner products of the terms, group by group: [g, t, t].
    left, right = (torch.einsum("sg...,tg...->gst", x, x).double() for x in (outputs, inputs))
    # The leading pair u = sum_t x_t G_t, v = sum_t y_t A_t of sum_t vec(G_t) vec(A_t)'
    # has x proportional to right y and y to left x.
    root = symmetric_root(left)
    values, vectors = torch.linalg.eigh(root @ right @ root)
    lead = vectors[..., -1:]
    y = (root @ lead)[..., 0].abs()
    x = (right @ y[..., None])[..., 0]
    norm = torch.einsum("gs,gst,gt->g", y, right, y).clamp_min(torch.finfo(y.dtype).tiny)
    # With v of norm 1 the best u is the sum applied to v.
    nearest = KroneckerProduct(
        weights,
        torch.einsum("gt,tg...->g...", (x / norm[:, None]).to(outputs), outputs),
        torch.einsum("gt,tg...->g...", y.to(inputs), inputs),
        examples,
    )
    squared = (left * right).sum((1, 2))
    missing = (squared - values[..., -1].clamp_min(0.0)).clamp_min(0.0)
    return nearest, float(missing.sum()), float(squared.sum())


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a batch of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    root: torch.Tensor = vectors * values.clamp_min(0.0).sqrt()[..., None, :] @ vectors.mT
    return root
