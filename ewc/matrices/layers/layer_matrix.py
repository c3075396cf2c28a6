"""Fisher matrices of one affine layer, whose weight and bias are read as one matrix."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ewc.checks import check_count, check_instance
from ewc.linalg.weight_layout import WeightLayout
from ewc.matrices.dense import DenseFisher
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import (
    Parameters,
    Shapes,
    check_same_shapes,
    shapes_of,
    size_of,
    unflatten,
)


@dataclass(frozen=True)
class LayerWeights:
    """The parameters of a layer as one matrix ``[g, o, i]``: the bias is its last column.

    Attributes:
        weight: the weight's name.
        bias: the bias's name; ``None`` for a layer without one.
        layout: how the weight is read as matrices.
    """

    weight: str
    bias: str | None
    layout: WeightLayout

    def __str__(self) -> str:
        """The names, the groups and whether the weight is transposed; for messages."""
        words = [self.weight, f"and {self.bias}" if self.bias is not None else ""]
        words += [f"in {self.layout.groups} groups" if self.layout.groups > 1 else ""]
        words += ["transposed" if self.layout.transposed else ""]
        return " ".join(word for word in words if word)

    @property
    def shapes(self) -> Shapes:
        """The parameters by name."""
        shapes = {self.weight: self.layout.shape}
        if self.bias is not None:
            groups, outputs, _ = self.layout.matrix_shape
            shapes[self.bias] = torch.Size([groups * outputs])
        return shapes

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``g``, ``o`` and ``i``, with the column of the bias."""
        groups, outputs, inputs = self.layout.matrix_shape
        return groups, outputs, inputs + (self.bias is not None)

    def to_matrix(self, v: Mapping[str, Tensor]) -> Tensor:
        """The parameters as a matrix ``[g, o, i]``."""
        matrix = self.layout.to_matrix(v[self.weight])
        if self.bias is None:
            return matrix
        return torch.cat([matrix, v[self.bias].reshape(*matrix.shape[:2], 1)], 2)

    def to_parameters(self, matrix: Tensor) -> Parameters:
        """The inverse of :meth:`to_matrix`."""
        if self.bias is None:
            return {self.weight: self.layout.to_parameter(matrix)}
        weight = self.layout.to_parameter(matrix[..., :-1])
        return {self.weight: weight, self.bias: matrix[..., -1].flatten()}

    def places(self, device: torch.device) -> Tensor:
        """The positions of the matrix's entries in the flat vector, ``[g, o, i]``."""
        size = sum(shape.numel() for shape in self.shapes.values())
        flat = torch.arange(size, device=device)
        return self.to_matrix(unflatten(flat, self.shapes))

    def new_outputs(self, old: "LayerWeights") -> int:
        """The number of outputs that ``old`` does not have."""
        return self.layout.matrix_shape[1] - old.layout.matrix_shape[1]

    def new_inputs(self, old: "LayerWeights") -> int:
        """The number of inputs that ``old`` does not have."""
        return self.layout.matrix_shape[2] - old.layout.matrix_shape[2]

    def description(self) -> dict[str, Any]:
        """The layer in a form that JSON can hold."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "shape": list(self.layout.shape),
            "groups": self.layout.groups,
            "transposed": self.layout.transposed,
        }

    @classmethod
    def from_description(cls, about: Mapping[str, Any]) -> "LayerWeights":
        """The inverse of :meth:`description`.

        Raises:
            ValueError: a size is not a whole number, 0 or more.
            TypeError: an entry has another type.
        """
        check_instance(about["weight"], str, "weight", "a name")
        check_instance(about["bias"], str | None, "bias", "a name or None")
        check_instance(about["transposed"], bool, "transposed", "True or False")
        check_count(about["groups"], "groups")
        layout = WeightLayout(size_of(about["shape"]), about["groups"], about["transposed"])
        return cls(about["weight"], about["bias"], layout)


class LayerMatrix(FisherMatrix):
    """A matrix over the parameters of one layer, defined by products with ``[g, o, i]`` matrices.

    Args:
        weights: the parameters.
        num_examples: the examples behind the mean.
    """

    def __init__(self, weights: LayerWeights, num_examples: int) -> None:
        self.weights = weights
        self.shapes = weights.shapes
        self.num_examples = num_examples

    @abstractmethod
    def times(self, matrix: Tensor) -> Tensor:
        """The product with a vector given as a ``[g, o, i]`` matrix."""

    @abstractmethod
    def enlarged(self, weights: LayerWeights) -> FisherMatrix:
        """The same matrix over a weight with more rows, for layers with one group."""

    def checked(self, v: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``v``, after a check of its names and shapes.

        Raises:
            ValueError: ``v`` does not have the layer's parameters.
        """
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        return v

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        return self.weights.to_parameters(self.times(self.weights.to_matrix(self.checked(v))))

    def embedded(self, shapes: Shapes) -> FisherMatrix:
        if dict(shapes) == dict(self.shapes):
            return self
        weights = replace(
            self.weights, layout=replace(self.weights.layout, shape=shapes[self.weights.weight])
        )
        # The new rows are new outputs or new inputs of the only group.
        if self.weights.layout.groups == 1 and dict(weights.shapes) == dict(shapes):
            return self.enlarged(weights)
        return DenseFisher(self.to_dense(), self.shapes, self.num_examples).embedded(shapes)


def one_more(matrix: Tensor, count: int, *, identity: bool, keep_last: bool = False) -> Tensor:
    """A batch of matrices with new rows and columns: zero, or those of the identity.

    Args:
        matrix: ``[g, d, d]``.
        count: the number of new rows and columns.
        identity: whether the new diagonal entries are 1.
        keep_last: whether the last row and column stay last.
    """
    if count == 0:
        return matrix
    groups, size = matrix.shape[:2]
    larger = matrix.new_zeros(groups, size + count, size + count)
    old = size - 1 if keep_last else size
    places = torch.arange(size, device=matrix.device)
    places[old:] += count
    larger[:, places[:, None], places[None, :]] = matrix
    if identity:
        larger[:, old : old + count, old : old + count] = torch.eye(
            count, dtype=matrix.dtype, device=matrix.device
        )
    return larger


def more_entries(tensor: Tensor, count: int, *, keep_last: bool) -> Tensor:
    """A tensor with new entries of 0 along its last dimension.

    Args:
        tensor: ``[..., d]``.
        count: the number of new entries.
        keep_last: whether the last entry stays last.
    """
    first, last = tensor.tensor_split([tensor.shape[-1] - keep_last], -1)
    return torch.cat([first, first.new_zeros(*first.shape[:-1], count), last], -1)
