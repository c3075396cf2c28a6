r"""What a structure leaves out of the Fisher matrix: its errors, by layer and between layers.

Errors are in the Frobenius norm: :math:`\|F - \hat F\|_F^2` is the mean of
:math:`\|(F - \hat F) v\|^2` over random directions with independent entries of unit variance.
"""

import torch
from torch import Tensor

from ewc.fisher.structures.block_diagonal import by_layer
from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import check_same_shapes


def error_by_layer(approximation: FisherMatrix, exact: FisherMatrix) -> dict[str, float]:
    r"""The relative error :math:`\|\hat F_l - F_l\|_F / \|F_l\|_F` of every layer's block.

    A layer is a module that holds parameters itself.  An approximation by 0 has an error of 1.
    A layer without information has the error 0 if it is 0 in both, else infinity.

    Args:
        approximation: :math:`\hat F`, of any structure.
        exact: :math:`F`, usually a :class:`~ewc.matrices.BlockDiagonalFisher` or a
            :class:`~ewc.DenseFisher`.  The former needs no matrix of the whole network's size.

    Returns:
        The error of every layer, by its name.

    Raises:
        ValueError: the matrices are over different parameters.
    """
    check_same_shapes(approximation.shapes, exact.shapes, "The approximation")
    approximations = layer_blocks(approximation)
    return {
        layer: _relative(approximations[layer], block)
        for layer, block in layer_blocks(exact).items()
    }


def relative_error(approximation: FisherMatrix, exact: FisherMatrix) -> float:
    r"""The relative error :math:`\|\hat F - F\|_F / \|F\|_F` of the whole matrix.

    Both matrices are made dense.

    Args:
        approximation: :math:`\hat F`, of any structure.
        exact: :math:`F`.

    Raises:
        ValueError: the matrices are over different parameters.
    """
    check_same_shapes(approximation.shapes, exact.shapes, "The approximation")
    return _relative(approximation.embedded(exact.shapes).to_dense(), exact.to_dense())


def share_between_layers(fisher: FisherMatrix) -> float:
    r"""The share of :math:`\|F\|_F^2` in the blocks between different layers, from 0 to 1.

    Every block-diagonal structure leaves this share out.  Its square root is the smallest
    :func:`relative_error` that such a structure can have.

    Args:
        fisher: the matrix; it should be one with entries between layers, such as a dense one.

    Raises:
        ValueError: the matrix is 0.
    """
    whole = float(fisher.to_dense().double().square().sum())
    if whole == 0:
        raise ValueError("The Fisher matrix must not be 0: a share of it is undefined.")
    within = sum(float(block.double().square().sum()) for block in layer_blocks(fisher).values())
    return max(0.0, 1 - within / whole)


def layer_blocks(fisher: FisherMatrix) -> dict[str, Tensor]:
    """The dense block ``[p_l, p_l]`` of every layer, by its name.

    The parameters of a layer are in the order of their names, not in that of the matrix.

    Args:
        fisher: the matrix, of any structure.
    """
    layers = {
        layer: dict(sorted(shapes.items())) for layer, shapes in by_layer(fisher.shapes).items()
    }
    if isinstance(fisher, BlockDiagonalFisher):
        dense_blocks = {}
        for layer, shapes in layers.items():
            inside = [block for block in fisher.blocks if block.shapes.keys() <= shapes.keys()]
            if {name for block in inside for name in block.shapes} != set(shapes):
                break  # a block over several layers
            of_layer = BlockDiagonalFisher(inside, shapes, fisher.num_examples)
            dense_blocks[layer] = of_layer.to_dense()
        else:
            return dense_blocks
    dense = fisher.to_dense()
    places, start = {}, 0
    for name, shape in fisher.shapes.items():
        places[name] = torch.arange(start, start + shape.numel(), device=dense.device)
        start += shape.numel()
    indices = {
        layer: torch.cat([places[name] for name in names]) for layer, names in layers.items()
    }
    return {layer: dense[index[:, None], index] for layer, index in indices.items()}


def _relative(approximation: Tensor, exact: Tensor) -> float:
    error = float((approximation.to(exact) - exact).norm())
    norm = float(exact.norm())
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return error / norm
