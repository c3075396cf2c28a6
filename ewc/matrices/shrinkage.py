r"""Shrinkage of the Fisher information over the units of a layer.

The Fisher information of a unit that no example excites is zero, and the quadratic that EWC
makes of it leaves the unit free, although it may become active within a few steps on another
task and then change the outputs for the old one.  Shrinkage gives every output unit ``o`` of a
layer a part of what its units have on average,

.. math:: F \leftarrow (1 - \alpha) F
          + \alpha \, \tfrac1O I_O \otimes \operatorname{tr}_O F ,

with the partial trace over the ``O`` output units: the inputs that matter for the layer matter
for all of its units.  The trace stays.  Of a Kronecker product :math:`G \otimes A` it is
:math:`G \leftarrow (1 - \alpha) G + \alpha \frac{\operatorname{tr} G}{O} I`, the linear
shrinkage of a covariance matrix (Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4).
"""

import torch
from torch import Tensor

from ewc.checks import check_share
from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.eigenvalue_corrected import EigenvalueCorrectedFisher
from ewc.matrices.kronecker import KroneckerFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import FisherMatrix
from ewc.matrices.sum import SumFisher
from ewc.pullback.accumulator import Configured


def shrunk(matrix: FisherMatrix, amount: float) -> FisherMatrix:
    r"""The matrix with the share :math:`\alpha` spread evenly over the units of each layer.

    Diagonal matrices take the first dimension of every parameter as its output units: right
    for linear layers and convolutions without groups; embeddings, transposed and grouped
    convolutions want a Kronecker matrix, which knows its layers.  Of Kronecker and
    eigenvalue-corrected matrices the blocks that are no products (scales and norms) stay as
    they are.  Of sums every term is shrunk.

    Args:
        matrix: a diagonal, Kronecker or eigenvalue-corrected Fisher matrix, or a sum of such.
        amount: :math:`\alpha`, from 0 (nothing) to 1 (all units alike).

    Raises:
        ValueError: ``amount`` is outside [0, 1].
        TypeError: the structure has no layers with output units.
    """
    check_share(amount, "shrinkage")
    if amount == 0:
        return matrix
    if isinstance(matrix, SumFisher):
        return SumFisher([shrunk(term, amount) for term in matrix.terms], matrix.num_examples)
    if isinstance(matrix, BlockDiagonalFisher) and any(map(_has_units, matrix.blocks)):
        blocks = [shrunk(b, amount) if _has_units(b) else b for b in matrix.blocks]
        return type(matrix)(blocks, matrix.shapes, matrix.num_examples)
    if isinstance(matrix, DiagonalFisher):
        entries = {
            name: _mixed(tensor, tensor.mean(0, keepdim=True), amount) if tensor.dim() else tensor
            for name, tensor in matrix.diagonal().items()
        }
        return DiagonalFisher(entries, matrix.num_examples)
    if isinstance(matrix, KroneckerProduct):
        outputs = matrix.outputs
        mean = outputs.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        return KroneckerProduct(
            matrix.weights, _mixed(outputs, mean * eye, amount), matrix.inputs, matrix.num_examples
        )
    if isinstance(matrix, EigenvalueCorrectedProduct):
        average = matrix.spectrum.mean(1, keepdim=True)
        return EigenvalueCorrectedProduct(
            matrix.weights,
            matrix.outputs,
            matrix.inputs,
            _mixed(matrix.spectrum, average, amount),
            matrix.num_examples,
        )
    raise TypeError(
        "shrinkage takes a diagonal, Kronecker or eigenvalue-corrected Fisher matrix, "
        f"not a {type(matrix).__name__}."
    )


def can_shrink(structure: type[FisherMatrix] | Configured[FisherMatrix]) -> bool:
    """Whether matrices of this structure have layers with output units."""
    kind = structure.structure if isinstance(structure, Configured) else structure
    return issubclass(kind, DiagonalFisher | KroneckerFisher | EigenvalueCorrectedFisher)


def _has_units(block: FisherMatrix) -> bool:
    if isinstance(block, SumFisher):
        return all(map(_has_units, block.terms))
    return isinstance(block, DiagonalFisher | KroneckerProduct | EigenvalueCorrectedProduct)


def _mixed(own: Tensor, average: Tensor, amount: float) -> Tensor:
    return (1 - amount) * own + amount * average
