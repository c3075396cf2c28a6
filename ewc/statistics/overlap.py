r"""Do two tasks use the same parameters?  The overlap of their Fisher matrices.

Kirkpatrick et al. 2017 (arXiv:1612.00796, section 4.3 of the supplement) scale both matrices
to unit trace.  The overlap is one minus their Frechet distance

.. math:: d^2(\hat F_1, \hat F_2) = \tfrac12 \operatorname{tr} \big( \hat F_1 + \hat F_2
          - 2 (\hat F_1 \hat F_2)^{1/2} \big) .

An overlap of 0 means that the tasks use different parameters, 1 that they use the same ones
alike.
"""

import torch
from torch import Tensor

from ewc.fisher.structures.block_diagonal import by_layer
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.kronecker import symmetric_root
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, flatten


def fisher_overlap(first: FisherMatrix, second: FisherMatrix) -> float:
    r"""The overlap :math:`1 - d^2 = \operatorname{tr} (\hat F_1 \hat F_2)^{1/2}`, from 0 to 1.

    Two diagonal matrices take ``p`` operations.  Other matrices are made dense.

    Args:
        first: the Fisher information of one task.
        second: that of another task, over the same parameters.

    Raises:
        ValueError: the matrices are over different parameters, or one is 0.
    """
    check_same_shapes(second.shapes, first.shapes, "The second matrix")
    if isinstance(first, DiagonalFisher) and isinstance(second, DiagonalFisher):
        p, q = (flatten(m.diagonal()).double() for m in (first, second))
        return _normalised((p * q).sqrt().sum(), p.sum(), q.sum())
    a, b = (m.to_dense().double() for m in (first, second))
    # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2).
    values = torch.linalg.svdvals(symmetric_root(a) @ symmetric_root(b))
    return _normalised(values.sum(), a.trace(), b.trace())


def fisher_overlap_by_layer(first: FisherMatrix, second: FisherMatrix) -> dict[str, float]:
    """The overlap of the diagonals within every layer, by the layer's name.

    A layer is a module that holds parameters itself.  Each layer is scaled to unit trace
    (figure 2C of the paper).  A layer without information for one of the tasks is left out.

    Args:
        first: the Fisher information of one task.
        second: that of another task, over the same parameters.

    Raises:
        ValueError: the matrices are over different parameters.
    """
    check_same_shapes(second.shapes, first.shapes, "The second matrix")
    diagonals = first.diagonal(), second.diagonal()
    overlaps: dict[str, float] = {}
    for layer, shapes in by_layer(first.shapes).items():
        blocks = [_block(diagonal, list(shapes)) for diagonal in diagonals]
        if all(float(block.trace()) > 0 for block in blocks):
            overlaps[layer] = fisher_overlap(*blocks)
    return overlaps


def _block(diagonal: Parameters, names: list[str]) -> DiagonalFisher:
    return DiagonalFisher({name: diagonal[name] for name in names}, num_examples=1)


def _normalised(product: Tensor, first: Tensor, second: Tensor) -> float:
    """The trace of the root, scaled to matrices of unit trace."""
    if not (float(first) > 0 and float(second) > 0):
        raise ValueError("Both Fisher matrices must have a trace above 0, but one is zero.")
    return float(product / (first * second).sqrt())
