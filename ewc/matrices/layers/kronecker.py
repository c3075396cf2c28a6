r"""One layer's block of K-FAC: a Kronecker product of two small matrices."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_not_negative
from ewc.linalg.krylov import largest_eigenvalues
from ewc.matrices.layers.eigenvalue_corrected import EigenbasisInverse, EigenvalueCorrectedProduct
from ewc.matrices.layers.layer_matrix import LayerMatrix, LayerWeights, more_entries, one_more
from ewc.matrices.layers.leading import leading_inverse
from ewc.matrices.matrix import DampedInverse, InputFactor, State
from ewc.parameters import Parameters, check_shape


class KroneckerProduct(LayerMatrix):
    r"""One layer's :math:`G \otimes A`: ``kron(G, A)`` for the row-major weight ``[o, i]``.

    ``g`` groups, ``o`` outputs, ``i`` inputs; a bias counts as the last input, which is 1.

    Args:
        weights: the parameters.
        outputs: :math:`G`, the second moments of the output gradients, ``[g, o, o]``.
        inputs: :math:`A`, the second moments of the inputs, ``[g, i, i]``, or ``[g, i]`` if
            diagonal.
        num_examples: the examples behind the mean.

    Raises:
        ValueError: a factor does not have the layer's shape.
    """

    def __init__(
        self, weights: LayerWeights, outputs: Tensor, inputs: Tensor, num_examples: int
    ) -> None:
        super().__init__(weights, num_examples)
        g, o, i = weights.matrix_shape
        check_shape(outputs, [g, o, o], "The first factor")
        check_shape(inputs, [g, i] if inputs.dim() == 2 else [g, i, i], "The second factor")
        self.outputs = outputs
        self.inputs = inputs
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}

    def times(self, matrix: Tensor) -> Tensor:
        """The product :math:`G X A`."""
        left = self.outputs @ matrix
        return left * self.inputs[:, None] if self.inputs.dim() == 2 else left @ self.inputs

    def input_factor(self) -> InputFactor | None:
        return self if self.inputs.dim() == 3 and len(self.inputs) == 1 else None

    @property
    def num_inputs(self) -> int:
        """``i``, the size of ``A``."""
        return self.inputs.shape[1]

    @property
    def input_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``A`` in double precision; multiples share them."""
        if "inputs" not in self._bases:
            values, vectors = torch.linalg.eigh(self.inputs[0].double())
            self._bases["inputs"] = values, vectors
        return self._bases["inputs"]

    def product_along(self, v: Mapping[str, Tensor], values: Tensor, vectors: Tensor) -> Parameters:
        r"""The product with :math:`\sum_j a_j u_j u_j^\top` in the place of ``A``.

        It takes ``2 o k (o + 2 i)`` operations instead of ``2 o i (o + i)``.

        Args:
            v: the vector.
            values: the :math:`a_j`, ``[k]``.
            vectors: the :math:`u_j` as rows, ``[k, i]``.
        """
        layout, bias = self.weights.layout, self.weights.bias
        weight = layout.to_matrix(v[self.weights.weight])[0]
        if bias is None:
            along = self.outputs[0] @ (weight @ vectors.T) * values
            return {self.weights.weight: layout.to_parameter((along @ vectors)[None])}
        # The bias apart: joining it to the weight would copy the weight twice.
        vectors, last = vectors[:, :-1], vectors[:, -1]
        along = torch.addmm(torch.outer(v[bias], last), weight, vectors.T)
        along = self.outputs[0] @ along * values
        product = layout.to_parameter((along @ vectors)[None])
        return {self.weights.weight: product, bias: along @ last}

    @cached_property
    def eigen(self) -> EigenvalueCorrectedProduct:
        """The same matrix by its eigenvectors and eigenvalues."""
        values, vectors = torch.linalg.eigh(self.outputs)
        if self.inputs.dim() == 2:
            input_values, input_vectors = self.inputs, None
        else:
            input_values, input_vectors = torch.linalg.eigh(self.inputs)
            input_values = input_values.clamp_min(0.0)
        spectrum = values.clamp_min(0.0)[:, :, None] * input_values[:, None, :]
        return EigenvalueCorrectedProduct(
            self.weights, vectors, input_vectors, spectrum, self.num_examples
        )

    def to_dense(self) -> Tensor:
        places = self.weights.places(self.device)
        size = self.num_parameters
        dense = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        inputs = torch.diag_embed(self.inputs) if self.inputs.dim() == 2 else self.inputs
        for place, left, right in zip(places, self.outputs, inputs, strict=True):
            flat = place.flatten()
            dense[flat[:, None], flat[None, :]] = torch.kron(left, right)
        return dense

    def diagonal(self) -> Parameters:
        left = self.outputs.diagonal(dim1=1, dim2=2)
        return self.weights.to_parameters(left[:, :, None] * self._input_diagonal[:, None, :])

    def trace(self) -> Tensor:
        left = self.outputs.diagonal(dim1=1, dim2=2).sum(1)
        return (left * self._input_diagonal.sum(1)).sum()

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(G \otimes A + \delta I) u = v`, with exact damping.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is singular.
        """
        return self.eigen.solve(v, damping)

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        return self.eigen.inverse_quadratic_forms(v, damping)

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, in the eigenbasis.

        With a tolerance above 0 it is :func:`~ewc.matrices.layers.leading.leading_inverse` where
        that is faster.

        Raises:
            ValueError: ``damping`` or ``tolerance`` is negative or not finite.
            torch.linalg.LinAlgError: the damped matrix is singular.
        """
        check_not_negative(damping, "damping")
        check_not_negative(tolerance, "tolerance")
        leading = leading_inverse(
            self.weights, self.outputs, self.inputs, damping=damping, tolerance=tolerance
        )
        return leading or EigenbasisInverse(self.eigen, damping)

    def inverse_diagonal(self, damping: float) -> Parameters:
        return self.eigen.inverse_diagonal(damping)

    def logdet(self, damping: float) -> Tensor:
        return self.eigen.logdet(damping)

    def eigenvalues(self) -> Tensor:
        return self.eigen.eigenvalues()

    def _largest_eigenvalue(self) -> float:
        diagonal = self.inputs.dim() == 2
        inputs = self.inputs.amax(1) if diagonal else largest_eigenvalues(self.inputs)
        return float((largest_eigenvalues(self.outputs) * inputs).max())

    def scaled(self, factor: float) -> "KroneckerProduct":
        outputs = factor * self.outputs
        result = KroneckerProduct(self.weights, outputs, self.inputs, self.num_examples)
        result._bases = self._bases
        return result

    def enlarged(self, weights: LayerWeights) -> "KroneckerProduct":
        outputs = one_more(self.outputs, weights.new_outputs(self.weights), identity=False)
        more = weights.new_inputs(self.weights)
        bias = self.weights.bias is not None
        if self.inputs.dim() == 2:
            inputs = more_entries(self.inputs, more, keep_last=bias)
        else:
            inputs = one_more(self.inputs, more, identity=False, keep_last=bias)
        return KroneckerProduct(weights, outputs, inputs, self.num_examples)

    @property
    def has_units(self) -> bool:
        return True

    def _shrunk(self, amount: float) -> "KroneckerProduct":
        mean = self.outputs.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(self.outputs.shape[1], dtype=self.dtype, device=self.device)
        outputs = (1 - amount) * self.outputs + amount * (mean * eye)
        return KroneckerProduct(self.weights, outputs, self.inputs, self.num_examples)

    def check_entries(self) -> None:
        super().check_entries()
        self._check_semidefinite(self.outputs)
        if self.inputs.dim() == 2:
            self._check_not_negative(self.inputs, "eigenvalue")
        else:
            self._check_semidefinite(self.inputs)

    def state(self) -> State:
        about = {**self.weights.description(), "num_examples": self.num_examples}
        return {"outputs": self.outputs, "inputs": self.inputs}, about

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        weights = LayerWeights.from_description(about)
        return cls(weights, tensors["outputs"], tensors["inputs"], about["num_examples"])

    @property
    def _input_diagonal(self) -> Tensor:
        diagonal = self.inputs.dim() == 2
        return self.inputs if diagonal else self.inputs.diagonal(dim1=1, dim2=2)
