r"""One layer's matrix by its eigenvectors: a Kronecker product of two bases."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_not_negative
from ewc.matrices.layers.layer_matrix import LayerMatrix, LayerWeights, more_entries, one_more
from ewc.matrices.layers.leading import leading_columns
from ewc.matrices.matrix import ROUNDING, DampedInverse, State
from ewc.parameters import Parameters, check_shape


class EigenvalueCorrectedProduct(LayerMatrix):
    r"""One layer's :math:`(Q_G \otimes Q_A)\, \mathrm{diag}(S)\, (Q_G \otimes Q_A)^\top`.

    ``g`` groups, ``o`` outputs, ``i`` inputs; a bias counts as the last input.

    Args:
        weights: the parameters.
        outputs: :math:`Q_G`, ``[g, o, o]``, orthogonal.
        inputs: :math:`Q_A`, ``[g, i, i]``, orthogonal; ``None`` for the identity.
        spectrum: :math:`S`, the eigenvalues, ``[g, o, i]``.
        num_examples: the examples behind the mean.

    Raises:
        ValueError: a basis or the spectrum does not have the layer's shape.
    """

    def __init__(
        self,
        weights: LayerWeights,
        outputs: Tensor,
        inputs: Tensor | None,
        spectrum: Tensor,
        num_examples: int,
    ) -> None:
        super().__init__(weights, num_examples)
        g, o, i = weights.matrix_shape
        check_shape(outputs, [g, o, o], "The first basis")
        if inputs is not None:
            check_shape(inputs, [g, i, i], "The second basis")
        check_shape(spectrum, [g, o, i], "The spectrum")
        self.outputs = outputs
        self.inputs = inputs
        self.spectrum = spectrum

    def rotated(self, matrix: Tensor) -> Tensor:
        """A ``[g, o, i]`` matrix in the eigenbasis, :math:`Q_G^T X Q_A`."""
        left = self.outputs.transpose(1, 2) @ matrix
        return left if self.inputs is None else left @ self.inputs

    def rotated_back(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`rotated`."""
        left = self.outputs @ matrix
        return left if self.inputs is None else left @ self.inputs.transpose(1, 2)

    def times(self, matrix: Tensor) -> Tensor:
        return self.rotated_back(self.spectrum * self.rotated(matrix))

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        damped = self.damped_spectrum(damping)
        rotated = self.rotated(self.weights.to_matrix(self.checked(v)))
        return self.weights.to_parameters(self.rotated_back(rotated / damped))

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        damped = self.damped_spectrum(damping)
        matrices: Tensor = torch.vmap(self.weights.to_matrix)(self._checked_rows(v))
        return (self.rotated(matrices).square() / damped).flatten(1).sum(1)

    def damped_inverse(self, damping: float, tolerance: float = 0.0) -> DampedInverse:
        r"""The operator :math:`v \mapsto (F + \delta I)^{-1} v`, in the eigenbasis.

        Eigenvalues up to ``tolerance * damping`` count as 0 where that is faster.

        Raises:
            ValueError: ``damping`` or ``tolerance`` is negative or not finite.
            torch.linalg.LinAlgError: an eigenvalue plus the damping is not above 0.
        """
        check_not_negative(damping, "damping")
        check_not_negative(tolerance, "tolerance")
        leading = leading_columns(
            self.weights,
            self.outputs,
            self.inputs,
            self.spectrum,
            damping=damping,
            tolerance=tolerance,
        )
        return leading or EigenbasisInverse(self, damping)

    def inverse_diagonal(self, damping: float) -> Parameters:
        return self._squares(1 / self.damped_spectrum(damping))

    def damped_spectrum(self, damping: float) -> Tensor:
        r"""The eigenvalues of :math:`F + \delta I`, ``[g, o, i]``.

        Raises:
            ValueError: ``damping`` is negative or not finite.
            torch.linalg.LinAlgError: an eigenvalue plus the damping is not above 0.
        """
        check_not_negative(damping, "damping")
        damped = self.spectrum + damping
        # Without damping, eigenvalues that are only rounding have no inverse.
        noise = torch.finfo(damped.dtype).eps * self.spectrum.max() if damping == 0 else 0.0
        if not bool((damped > noise).all()):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"damping must be above 0, as the Fisher matrix of {', '.join(self.shapes)} is "
                f"singular; got {damping!r}."
            )
        return damped

    def diagonal(self) -> Parameters:
        return self._squares(self.spectrum)

    def _squares(self, spectrum: Tensor) -> Parameters:
        """The diagonal of the matrix with these eigenvalues."""
        squares = self.outputs.square() @ spectrum
        if self.inputs is not None:
            squares = squares @ self.inputs.square().transpose(1, 2)
        return self.weights.to_parameters(squares)

    def trace(self) -> Tensor:
        return self.spectrum.sum()

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\sum \log (S + \delta)`.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        check_not_negative(damping, "damping")
        # Rounding can leave an eigenvalue of 0 slightly negative.
        return (self.spectrum.clamp_min(0.0) + damping).log().sum()

    def eigenvalues(self) -> Tensor:
        return self.spectrum.flatten().sort().values

    def _largest_eigenvalue(self) -> float:
        return float(self.spectrum.max())

    def scaled(self, factor: float) -> "EigenvalueCorrectedProduct":
        return self._with(self.weights, self.outputs, self.inputs, factor * self.spectrum)

    def enlarged(self, weights: LayerWeights) -> "EigenvalueCorrectedProduct":
        more = weights.new_outputs(self.weights), weights.new_inputs(self.weights)
        bias = self.weights.bias is not None
        outputs = one_more(self.outputs, more[0], identity=True)
        inputs = self.inputs
        if inputs is not None:
            inputs = one_more(inputs, more[1], identity=True, keep_last=bias)
        spectrum = torch.nn.functional.pad(self.spectrum, (0, 0, 0, more[0]))
        spectrum = more_entries(spectrum, more[1], keep_last=bias)
        return self._with(weights, outputs, inputs, spectrum)

    def seen_in(self, basis: "EigenvalueCorrectedProduct") -> Tensor:
        r"""The eigenvalues of the nearest matrix with other eigenvectors, ``[g, o, i]``.

        Nearest in the Frobenius norm is the diagonal in these eigenvectors,
        :math:`S' = (Q_G'^\top Q_G)^2 \, S \, (Q_A^\top Q_A')^2` with entry-wise squares.  It has
        the same trace.

        Args:
            basis: a matrix of the same layer, whose eigenvectors are taken.
        """
        spectrum = (basis.outputs.mT @ self.outputs).square() @ self.spectrum
        if self.inputs is None or basis.inputs is None:
            return spectrum  # one-hot inputs have the identity as basis in every matrix
        return spectrum @ (self.inputs.mT @ basis.inputs).square()

    @property
    def has_units(self) -> bool:
        return True

    def _shrunk(self, amount: float) -> "EigenvalueCorrectedProduct":
        average = self.spectrum.mean(1, keepdim=True)
        spectrum = (1 - amount) * self.spectrum + amount * average
        return self._with(self.weights, self.outputs, self.inputs, spectrum)

    def check_entries(self) -> None:
        self._check_finite()
        # Rounding can leave an eigenvalue of 0 slightly negative.
        slack = ROUNDING * float(self.spectrum.abs().max())
        self._check_not_negative(self.spectrum, "eigenvalue", slack=slack)

    def state(self) -> State:
        tensors = {"outputs": self.outputs, "spectrum": self.spectrum}
        if self.inputs is not None:
            tensors["inputs"] = self.inputs
        return tensors, {**self.weights.description(), "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        return cls(
            LayerWeights.from_description(about),
            tensors["outputs"],
            tensors.get("inputs"),
            tensors["spectrum"],
            about["num_examples"],
        )

    def _with(
        self, weights: LayerWeights, outputs: Tensor, inputs: Tensor | None, spectrum: Tensor
    ) -> "EigenvalueCorrectedProduct":
        return EigenvalueCorrectedProduct(weights, outputs, inputs, spectrum, self.num_examples)


class EigenbasisInverse(DampedInverse):
    r"""The inverse of a layer's matrix :math:`(Q_G \otimes Q_A) S (Q_G \otimes Q_A)^\top`.

    It takes ``4 o i (o + i)`` operations.

    Args:
        matrix: the layer's matrix.
        damping: :math:`\delta`.

    Raises:
        torch.linalg.LinAlgError: an eigenvalue plus the damping is not above 0.
    """

    def __init__(self, matrix: "EigenvalueCorrectedProduct", damping: float) -> None:
        self.matrix = matrix
        self.inverse = 1 / matrix.damped_spectrum(damping)

    def __call__(self, v: Mapping[str, Tensor]) -> Parameters:
        weights = self.matrix.weights
        rotated = self.matrix.rotated(weights.to_matrix(self.matrix.checked(v))) * self.inverse
        return weights.to_parameters(self.matrix.rotated_back(rotated))
