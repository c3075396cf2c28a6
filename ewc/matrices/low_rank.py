r"""The Fisher information as a low-rank matrix plus a diagonal."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_not_negative
from ewc.matrices.matrix import FisherMatrix, State
from ewc.parameters import (
    Parameters,
    Shapes,
    check_same_shapes,
    check_shape,
    flatten,
    padded,
    shapes_of,
    unflatten,
)


class LowRankFisher(FisherMatrix):
    r"""The leading directions and the rest of the diagonal, :math:`U \Lambda U^\top + D`.

    The request ``LowRank()`` gives a randomised Nystrom approximation of rank ``r``, which never
    exceeds ``F`` (Frangella, Tropp & Udell 2023, arXiv:2110.02820, algorithm 2.1).  :math:`D` is
    the missing diagonal, so that the result has the exact diagonal and trace.  Unlike blocks, it
    has correlations between layers.  It takes one pass over the data, at the cost of about
    ``2 (r + 10)`` products with ``F``, whatever the number of score vectors.

    Memory :math:`(r + 1) p`, and ``(r + 13) p`` while it is computed, with 10 columns beyond the
    rank.  ``matvec`` takes :math:`4 r p` operations, ``solve`` and ``logdet`` :math:`r^2 p`.
    ``eigenvalues`` go through the dense matrix.

    Args:
        vectors: :math:`U`, ``[p, r]``, orthonormal columns in the flat order.
        values: the diagonal of :math:`\Lambda`, ``[r]``.
        rest: :math:`D`, by parameter.
        num_examples: the examples behind the mean.

    Raises:
        ValueError: the vectors or the values do not fit the parameters.
    """

    def __init__(
        self, vectors: Tensor, values: Tensor, rest: Parameters, num_examples: int
    ) -> None:
        size = sum(entries.numel() for entries in rest.values())
        check_shape(values, [len(values)], "The set of values")
        check_shape(vectors, [size, len(values)], "The set of vectors")
        self.vectors = vectors
        self.values = values
        self.rest = rest
        self.shapes = shapes_of(rest)
        self.num_examples = num_examples

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        r"""The product :math:`U \Lambda U^\top v + D v`."""
        flat = self._flat(v)
        product = self.vectors @ (self.values * (self.vectors.T @ flat)) + self._rest * flat
        return unflatten(product, self.shapes)

    def diagonal(self) -> Parameters:
        entries = self._rest
        # Column by column: the squares of all would take as much memory as the vectors.
        for value, column in zip(self.values, self.vectors.T, strict=True):
            entries.addcmul_(value * column, column)
        return unflatten(entries, self.shapes)

    def to_dense(self) -> Tensor:
        dense = (self.vectors * self.values) @ self.vectors.T
        dense.diagonal().add_(self._rest)
        return dense

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(U \Lambda U^\top + D + \delta I) u = v`, by Woodbury.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: an entry of ``D`` plus the damping is 0.
        """
        flat = self._flat(v)
        damped, scaled, inner = self._woodbury(damping)
        correction = torch.cholesky_solve((scaled.T @ flat)[:, None], inner)[:, 0]
        return unflatten(flat / damped - scaled @ correction, self.shapes)

    def inverse_diagonal(self, damping: float) -> Parameters:
        r"""The diagonal of :math:`(U \Lambda U^\top + D + \delta I)^{-1}`, by Woodbury.

        Raises:
            ValueError: ``damping`` is negative or not finite.
            torch.linalg.LinAlgError: an entry of ``D`` plus the damping is 0.
        """
        damped, scaled, inner = self._woodbury(damping)
        columns = torch.linalg.solve_triangular(inner, scaled.T, upper=False)
        return unflatten(1 / damped - columns.square().sum(0), self.shapes)

    def _woodbury(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        r""":math:`E = D + \delta I`, :math:`E^{-1} W` and :math:`L L^\top = I + W^\top E^{-1} W`.

        With :math:`W = U \Lambda^{1/2}`.
        """
        damped = self._damped_rest(damping)
        if not bool((damped > 0).all()):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                "damping must be above 0, as the diagonal of the low-rank Fisher matrix has "
                f"entries of 0; got {damping!r}."
            )
        root = self.vectors * self.values.sqrt()
        scaled = root / damped[:, None]
        return damped, scaled, torch.linalg.cholesky(self._capacitance(root, scaled))

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\log \det (U \Lambda U^\top + D + \delta I)`, by the determinant lemma.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        damped = self._damped_rest(damping)
        if not bool((damped > 0).all()):
            return super().logdet(damping)
        root = self.vectors * self.values.sqrt()
        inner = self._capacitance(root, root / damped[:, None])
        logdet: Tensor = torch.linalg.slogdet(inner).logabsdet
        return logdet + damped.log().sum()

    def scaled(self, factor: float) -> "LowRankFisher":
        rest = {name: factor * entries for name, entries in self.rest.items()}
        return LowRankFisher(self.vectors, factor * self.values, rest, self.num_examples)

    def embedded(self, shapes: Shapes) -> "LowRankFisher":
        columns = [padded(unflatten(column, self.shapes), shapes) for column in self.vectors.T]
        vectors = torch.stack([flatten(column) for column in columns], 1)
        return LowRankFisher(vectors, self.values, padded(self.rest, shapes), self.num_examples)

    def check_entries(self) -> None:
        super().check_entries()
        self._check_not_negative(self.values, "eigenvalue")
        for name, entries in self.rest.items():
            self._check_not_negative(entries, "rest of its diagonal", name)

    def state(self) -> State:
        tensors = {"vectors": self.vectors, "values": self.values}
        tensors |= {f"rest/{name}": entries for name, entries in self.rest.items()}
        return tensors, {"names": list(self.shapes), "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        rest = {name: tensors[f"rest/{name}"] for name in about["names"]}
        return cls(tensors["vectors"], tensors["values"], rest, about["num_examples"])

    @property
    def _rest(self) -> Tensor:
        return flatten(self.rest)

    def _damped_rest(self, damping: float) -> Tensor:
        check_not_negative(damping, "damping")
        return self._rest + damping

    def _flat(self, v: Mapping[str, Tensor]) -> Tensor:
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        return flatten({name: v[name] for name in self.shapes})

    @staticmethod
    def _capacitance(root: Tensor, scaled: Tensor) -> Tensor:
        inner = root.T @ scaled
        inner.diagonal().add_(1.0)
        return inner
