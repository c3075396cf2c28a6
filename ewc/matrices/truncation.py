r"""Kronecker matrices with some of the eigenvectors of their input factors."""

import torch

from ewc.checks import check_count
from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.truncated import TruncatedProduct
from ewc.matrices.matrix import FisherMatrix
from ewc.matrices.sum import SumFisher


def check_rank(rank: int | None) -> None:
    """Refuse what is no number of eigenvectors.

    Raises:
        ValueError: the rank is not a whole number, 1 or more, or ``None`` for all.
    """
    check_count(rank, "rank", optional=True)


def truncated(matrix: FisherMatrix, rank: int) -> FisherMatrix:
    r"""The matrix with the leading eigenvectors of every layer's input factor.

    Of a layer's :math:`G \otimes A` with ``o`` outputs and ``i`` inputs
    :math:`G \otimes \sum_{j \le k} a_j u_j u_j^\top` is left, the nearest matrix in the
    Frobenius norm with a second factor of rank ``k``: memory :math:`o^2 + i k` instead of
    :math:`o^2 + i^2`, a product ``2 o k (o + 2 i)`` operations instead of ``2 o i (o + i)``.
    Along the other inputs nothing is held.  Layers of up to ``rank`` inputs, with groups or
    with a diagonal factor, and blocks that are no Kronecker products stay as they are; of
    sums every term is truncated.

    Args:
        matrix: of any structure.
        rank: ``k``.

    Raises:
        ValueError: the rank is below 1.
    """
    check_rank(rank)
    if isinstance(matrix, SumFisher):
        return SumFisher([truncated(term, rank) for term in matrix.terms], matrix.num_examples)
    if isinstance(matrix, BlockDiagonalFisher):
        blocks = [truncated(block, rank) for block in matrix.blocks]
        return type(matrix)(blocks, matrix.shapes, matrix.num_examples)
    if not isinstance(matrix, KroneckerProduct):
        return matrix
    inputs = matrix.inputs
    if inputs.dim() == 2 or len(inputs) > 1 or inputs.shape[1] <= rank:
        return matrix
    values, vectors = (tensor[0] for tensor in matrix.input_eigen)
    return TruncatedProduct(
        matrix.weights,
        matrix.outputs,
        vectors[:, -rank:].T.to(matrix.dtype, memory_format=torch.contiguous_format),
        values[-rank:].clamp_min(0.0).to(matrix.dtype),
        matrix.num_examples,
    )
