"""Vectors of parameters, from those of tensors that the network makes of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ewc.linalg.devices import out_of_memory
from ewc.parameters import Parameters, Shapes
from ewc.pullback.graph import Derived
from ewc.pullback.lookups import Lookups, padding_of
from ewc.pullback.pullback import Pullback, Stored

KEEPING = {
    *("ViewBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "CloneBackward0"),
    *("SqueezeBackward0", "SqueezeBackward1", "ToCopyBackward0"),
}
"""Nodes that keep all entries in their order."""


def behind(inner: Pullback, tensors: Mapping[str, Derived], parameters: Parameters) -> Pullback:
    """The vectors of the parameters behind derived tensors, in the form that suits them.

    Args:
        inner: the vectors of parameters and of derived tensors.
        tensors: the derived tensors, by name.
        parameters: the parameters to pull back to.
    """
    return _lookups(inner, tensors, parameters) or Behind(inner, tensors, parameters)


def _lookups(
    inner: Pullback, tensors: Mapping[str, Derived], parameters: Parameters
) -> Lookups | None:
    """The vectors of an embedding whose indices are the same for all examples, as of places."""
    if not isinstance(inner, Stored) or len(inner.vectors) != 1:
        return None
    ((name, vectors),) = inner.vectors.items()
    if len(tensors[name].parameters) != 1:
        return None
    node: Any = tensors[name].edge.node
    while type(node).__name__ in KEEPING:
        node = node.next_functions[0][0]
    (parameter,) = tensors[name].parameters
    weight = parameters[parameter]
    if type(node).__name__ != "EmbeddingBackward0":
        return None
    if getattr(node.next_functions[0][0], "variable", None) is not weight:
        return None
    k, n = vectors.shape[:2]
    indices = node._saved_indices.flatten().long()
    return Lookups(
        parameter,
        weight.shape,
        indices.expand(n, -1),
        vectors.reshape(k, n, len(indices), weight.shape[1]),
        memory=inner.memory,
        padding=padding_of(node, weight.shape[0]),
    )


class Behind(Pullback):
    r"""The vectors of the parameters that other tensors are computed from.

    A normalised weight, a slice of position embeddings or a rescaled gate is a tensor
    :math:`u(\theta)` without examples.  Its vectors :math:`v` are pulled back once more, as
    :math:`(\partial u / \partial \theta)^\top v`.

    Args:
        inner: the vectors of parameters and of derived tensors.
        tensors: the derived tensors, by name.
        parameters: the parameters to pull back to.
    """

    def __init__(
        self, inner: Pullback, tensors: Mapping[str, Derived], parameters: Parameters
    ) -> None:
        self.inner = inner
        self.parameters = parameters
        self.tensors = {name: tensors[name] for name in inner.shapes if name in tensors}
        behind = {name for tensor in self.tensors.values() for name in tensor.parameters}
        self.shapes = {
            name: parameter.shape
            for name, parameter in parameters.items()
            if name in behind or name in inner.shapes
        }
        self.num_vectors, self.num_examples = inner.num_vectors, inner.num_examples
        self.dtype, self.memory = inner.dtype, inner.memory

    def bytes_per_example(self) -> int:
        return super().bytes_per_example() + self.inner.bytes_per_example()

    def per_example(self, examples: slice) -> Parameters:
        vectors = self.inner.per_example(examples)
        total = {name: vectors[name] for name in self.shapes if name in vectors}
        for name, tensor in self.tensors.items():
            for parameter, pulled in self._pulled_back(tensor, vectors[name]).items():
                total[parameter] = total[parameter] + pulled if parameter in total else pulled
        return total

    def _pulled_back(self, tensor: Derived, vectors: Tensor) -> Parameters:
        """The vectors ``[k, n, *tensor.shape]`` of a derived tensor, as those of parameters."""
        names = [name for name in tensor.parameters if name in self.shapes]
        sources = [self.parameters[name] for name in names]
        flat = vectors.flatten(0, 1).to(tensor.dtype)
        gradients = self._all_together(tensor, sources, flat)
        shape = vectors.shape[:2]
        return {
            name: gradient.to(self.dtype).reshape(*shape, *gradient.shape[1:])
            for name, gradient in zip(names, gradients, strict=True)
        }

    @staticmethod
    def _all_together(tensor: Derived, sources: list[Tensor], vectors: Tensor) -> list[Tensor]:
        """The gradients of all vectors ``[r, *tensor.shape]``, by a loop if need be."""
        try:
            return list(
                torch.autograd.grad(
                    [tensor.edge], sources, [vectors], retain_graph=True, is_grads_batched=True
                )
            )
        except RuntimeError as error:  # an operation without a rule for vmap
            if out_of_memory(error):
                raise
            rows = [
                torch.autograd.grad([tensor.edge], sources, [vector], retain_graph=True)
                for vector in vectors
            ]
            return [torch.stack(column) for column in zip(*rows, strict=True)]


class Reshaped(Pullback):
    """The vectors of parameters that have another shape than those of another pullback.

    Args:
        inner: the other pullback.
        shapes: the shapes of the parameters, with as many entries.
    """

    def __init__(self, inner: Pullback, shapes: Shapes) -> None:
        self.inner = inner
        self.shapes = shapes
        self.num_vectors, self.num_examples = inner.num_vectors, inner.num_examples
        self.dtype, self.memory = inner.dtype, inner.memory

    def bytes_per_example(self) -> int:
        return self.inner.bytes_per_example()

    def per_example(self, examples: slice) -> Parameters:
        vectors = self.inner.per_example(examples)
        return {n: v.reshape(*v.shape[:2], *self.shapes[n]) for n, v in vectors.items()}

    def add_squares(self, total: Parameters) -> None:
        self.inner.add_squares(self._views(total))

    def project(self, directions: Parameters) -> Tensor:
        return self.inner.project(self._views(directions))

    def add_combinations(self, coefficients: Tensor, total: Parameters) -> None:
        self.inner.add_combinations(coefficients, self._views(total))

    def _views(self, tensors: Parameters) -> Parameters:
        """Tensors ``[..., *shape]`` in the shapes of the other pullback."""
        return {
            name: tensors[name].view(
                *tensors[name].shape[: tensors[name].dim() - len(shape)], *self.inner.shapes[name]
            )
            for name, shape in self.shapes.items()
        }
