r"""One layer's Kronecker product with a second factor of low rank."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.layers.layer_matrix import LayerMatrix, LayerWeights
from ewc.matrices.matrix import State
from ewc.parameters import Parameters, check_shape


class TruncatedProduct(LayerMatrix):
    r"""One layer's :math:`G \otimes \sum_j a_j u_j u_j^\top` with ``k`` of the ``i`` vectors.

    A product takes ``2 o k (o + 2 i)`` operations instead of ``2 o i (o + i)``; the other
    verbs are those of the Kronecker product with the second factor as a matrix.  Of a layer
    without groups.

    Args:
        weights: the parameters.
        outputs: :math:`G`, ``[1, o, o]``.
        vectors: the :math:`u_j` as rows, orthonormal, ``[k, i]``.
        values: the :math:`a_j`, ``[k]``.
        num_examples: the examples behind the mean.

    Raises:
        ValueError: a tensor does not have the layer's shape.
    """

    def __init__(
        self,
        weights: LayerWeights,
        outputs: Tensor,
        vectors: Tensor,
        values: Tensor,
        num_examples: int,
    ) -> None:
        super().__init__(weights, num_examples)
        g, o, i = weights.matrix_shape
        check_shape(outputs, [g, o, o], "The first factor")
        check_shape(values, [len(vectors)], "The set of values")
        check_shape(vectors, [len(values), i], "The set of vectors")
        self.outputs = outputs
        self.vectors = vectors
        self.values = values

    @cached_property
    def whole(self) -> KroneckerProduct:
        """The same matrix with the second factor as a matrix."""
        inputs = (self.vectors.T * self.values @ self.vectors)[None]
        return KroneckerProduct(self.weights, self.outputs, inputs, self.num_examples)

    def times(self, matrix: Tensor) -> Tensor:
        r"""The product :math:`\sum_j a_j (G X u_j) u_j^\top`."""
        return self.outputs @ (matrix @ self.vectors.T) * self.values @ self.vectors

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The product.

        Raises:
            ValueError: ``v`` does not have the layer's parameters.
        """
        layout, bias = self.weights.layout, self.weights.bias
        if bias is None:
            return super().matvec(v)
        # The bias apart: putting it beside the weight would copy that, there and back.
        weight = layout.to_matrix(self.checked(v)[self.weights.weight])[0]
        vectors, last = self.vectors[:, :-1], self.vectors[:, -1]
        along = torch.addmm(torch.outer(v[bias], last), weight, vectors.T)
        along = self.outputs[0] @ along * self.values
        product = layout.to_parameter((along @ vectors)[None])
        return {self.weights.weight: product, bias: along @ last}

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(F + \delta I) u = v`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is singular.
        """
        return self.whole.solve(v, damping)

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        r"""The scalars :math:`v_n^\top (F + \delta I)^{-1} v_n` of many vectors, ``[n]``.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is singular.
        """
        return self.whole.inverse_quadratic_forms(v, damping)

    def inverse_diagonal(self, damping: float) -> Parameters:
        r"""The diagonal of :math:`(F + \delta I)^{-1}`, by parameter.

        Raises:
            ValueError: ``damping`` is negative or not finite.
            torch.linalg.LinAlgError: the damped matrix is singular.
        """
        return self.whole.inverse_diagonal(damping)

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\log \det (F + \delta I)`.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        return self.whole.logdet(damping)

    def eigenvalues(self) -> Tensor:
        """The products of the factors' eigenvalues, in ascending order."""
        return self.whole.eigenvalues()

    def trace(self) -> Tensor:
        """The trace of the first factor times the sum of the values."""
        return self.outputs.diagonal(dim1=1, dim2=2).sum() * self.values.sum()

    def to_dense(self) -> Tensor:
        """The Kronecker product, ``[p, p]``."""
        return self.whole.to_dense()

    def diagonal(self) -> Parameters:
        """The products of the factors' diagonals."""
        return self.whole.diagonal()

    def enlarged(self, weights: LayerWeights) -> KroneckerProduct:
        """The same over a weight with more rows, of which nothing is known."""
        return self.whole.enlarged(weights)

    def scaled(self, factor: float) -> "TruncatedProduct":
        """The values times ``factor``."""
        return TruncatedProduct(
            self.weights, self.outputs, self.vectors, factor * self.values, self.num_examples
        )

    def check_entries(self) -> None:
        """Check the diagonal, that all entries are finite, and the eigenvalues."""
        super().check_entries()
        self._check_semidefinite(self.outputs)
        self._check_not_negative(self.values, "eigenvalue")

    def state(self) -> State:
        """The first factor, the vectors and their values; what layer they are of."""
        about = {**self.weights.description(), "num_examples": self.num_examples}
        tensors = {"outputs": self.outputs, "vectors": self.vectors, "values": self.values}
        return tensors, about

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix of this first factor and these vectors."""
        weights = LayerWeights.from_description(about)
        return cls(
            weights,
            tensors["outputs"],
            tensors["vectors"],
            tensors["values"],
            about["num_examples"],
        )
