r"""The Kronecker-factored Fisher information (K-FAC)."""

from collections.abc import Sequence

import torch

from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import FisherMatrix


class KroneckerFisher(BlockDiagonalFisher):
    r"""K-FAC: :math:`F_l \approx G_l \otimes A_l` for every layer (Martens & Grosse 2015).

    :math:`G = \frac1N \sum_{n,k,t} g g^\top` are the second moments of the gradients with
    respect to the layer's outputs, :math:`A = \frac1{N T} \sum_{n,t} a a^\top` those of its
    inputs with a 1 appended for the bias (arXiv:1503.05671, equation 1).  A weight that is
    used at ``T`` positions (convolutions, sequences, repeated calls) takes all of them as
    examples of their own: K-FAC-expand (Eschenhagen et al. 2023, arXiv:2311.00636,
    equation 22).  With ``Kronecker(reduce=True)`` the inputs are averaged
    and the gradients summed over positions first: K-FAC-reduce (equation 23), exact where
    a linear network averages over positions.

    The matrix is exact for a deep linear network with a Gaussian likelihood, and for a
    single example; the layers' inputs and gradients are otherwise taken to be independent.
    A layer that is not of this form (a normalisation, a weight tied to an embedding, what
    no rule covers) has its exact dense block instead, and printing says so.  Where that
    block is above 512 MiB (11,585 parameters in single precision) the layer has its exact
    diagonal, with a warning.

    ``T`` is the example's own number of positions, so that the matrix does not depend on
    how the data are cut into batches.  Where only some examples use a layer (experts, heads)
    :math:`G` is the mean over these, and the block has their share.

    Memory :math:`o^2 + i^2` a layer; ``matvec`` :math:`o i (o + i)` operations; ``solve``,
    ``logdet`` and ``eigenvalues`` once :math:`o^3 + i^3`.  A sum of two is exact and lazy;
    :meth:`nearest` makes one product of it.
    """

    form = KroneckerProduct

    def nearest(self) -> "KroneckerFisher":
        """The nearest Kronecker matrix: see :func:`nearest_kronecker`."""
        return nearest_kronecker(self)[0]


def nearest_kronecker(fisher: FisherMatrix) -> tuple[KroneckerFisher, float]:
    r"""The Kronecker matrix nearest to a sum of Kronecker matrices, and how far it is.

    For every layer the :math:`G, A` that minimise
    :math:`\| \sum_t G_t \otimes A_t - G \otimes A \|_F`: the leading singular vectors of
    :math:`\sum_t \mathrm{vec}(G_t) \mathrm{vec}(A_t)^\top` (Van Loan & Pitsianis 1993).
    They are combinations of the :math:`G_t` and of the :math:`A_t` with weights that are
    not negative, so the result is positive semi-definite.  Exact blocks are added exactly.

    Args:
        fisher: a :class:`KroneckerFisher`, or what ``+`` made of several.

    Returns:
        The matrix, and the error :math:`\| \cdot \|_F / \| \sum_t F_t \|_F` over all layers.

    Raises:
        ValueError: it is no sum of Kronecker matrices over the same layers.
    """
    if not isinstance(fisher, BlockDiagonalFisher):
        raise ValueError(  # noqa: TRY004 - the sum's terms are at fault, not its type
            f"{type(fisher).__name__} is no sum of Kronecker matrices over the same layers: "
            "only such a sum has a nearest Kronecker matrix."
        )
    blocks: list[FisherMatrix] = []
    error, total = 0.0, 0.0
    for block in fisher.blocks:
        terms = block.terms
        if not all(isinstance(term, KroneckerProduct) for term in terms):
            if len(terms) > 1 or isinstance(block, EigenvalueCorrectedProduct):
                raise ValueError(
                    f"The block of {', '.join(block.shapes)} is no sum of Kronecker products: "
                    "only such a sum has a nearest Kronecker matrix."
                )
            blocks.append(block)
            continue
        nearest, squared, norm = _nearest(terms)  # type: ignore[arg-type]
        blocks.append(nearest)
        error, total = error + squared, total + norm
    result = KroneckerFisher(blocks, fisher.shapes, fisher.num_examples)
    return result, (error / total) ** 0.5 if total > 0 else 0.0


def _nearest(terms: Sequence[KroneckerProduct]) -> tuple[KroneckerProduct, float, float]:
    """One layer's nearest product, the squared error, and the squared norm of the sum."""
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
