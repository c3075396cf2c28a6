r"""The Fisher information as a low-rank matrix plus a diagonal."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from ewc.checks import check_count, check_not_negative
from ewc.fisher.accumulator import Accumulator
from ewc.fisher.diagonal import DiagonalSum
from ewc.fisher.matrix import FisherMatrix, State
from ewc.fisher.pullback import Chunk
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    check_shape,
    flatten,
    padded,
    shapes_of,
    unflatten,
)


class LowRankFisher(FisherMatrix):
    r"""The leading directions and what they leave of the diagonal, :math:`U \Lambda U^\top + D`.

    From the pass over the data it is a randomised Nystrom approximation of rank ``r``
    (Frangella, Tropp & Udell 2023, arXiv:2110.02820, algorithm 2.1), which never exceeds
    ``F``, and the diagonal that is missing: the result has the exact diagonal and trace.
    It sees correlations between layers, which blocks do not.  One pass, whose cost is
    that of some ``2 (r + 10)`` products with ``F``, whatever the number of score vectors.

    Memory :math:`(r + 1) p`; ``matvec`` :math:`4 r p` operations; ``solve`` and ``logdet``
    :math:`r^2 p`; ``eigenvalues`` by the dense matrix.  Options, by
    ``LowRankFisher.configured(rank=..., oversampling=..., seed=...)``: the rank (20), the
    random directions beyond it (10), their seed (0).

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

    @classmethod
    def accumulator(
        cls, parameters: Parameters, rank: int = 20, oversampling: int = 10, seed: int = 0
    ) -> Accumulator:
        """An empty sketch and diagonal.

        Args:
            parameters: over which the matrix is.
            rank: of the low-rank part.
            oversampling: random directions beyond the rank.
            seed: of the random directions.
        """
        return SketchSum(parameters, rank, oversampling, seed)

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        r"""The product :math:`U \Lambda U^\top v + D v`.

        Raises:
            ValueError: ``v`` does not have the matrix's parameters.
        """
        flat = self._flat(v)
        product = self.vectors @ (self.values * (self.vectors.T @ flat)) + self._rest * flat
        return unflatten(product, self.shapes)

    def diagonal(self) -> Parameters:
        """The diagonal, by parameter."""
        entries = self.vectors.square() @ self.values + self._rest
        return unflatten(entries, self.shapes)

    def to_dense(self) -> Tensor:
        """The matrix itself, ``[p, p]``."""
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
                "The diagonal of the low-rank Fisher matrix is 0 somewhere: solve takes a "
                "damping above 0."
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
        """Both parts times ``factor``."""
        rest = {name: factor * entries for name, entries in self.rest.items()}
        return LowRankFisher(self.vectors, factor * self.values, rest, self.num_examples)

    def embedded(self, shapes: Shapes) -> "LowRankFisher":
        """Zeros for new names and new last rows."""
        columns = [padded(unflatten(column, self.shapes), shapes) for column in self.vectors.T]
        vectors = torch.stack([flatten(column) for column in columns], 1)
        return LowRankFisher(vectors, self.values, padded(self.rest, shapes), self.num_examples)

    def check_entries(self) -> None:
        """Check the diagonal, that all entries are finite, and both parts' eigenvalues."""
        super().check_entries()
        self._check_not_negative(self.values, "eigenvalue")
        for name, entries in self.rest.items():
            self._check_not_negative(entries, "rest of its diagonal", name)

    def state(self) -> State:
        """The two parts; the names in the flat order."""
        tensors = {"vectors": self.vectors, "values": self.values}
        tensors |= {f"rest/{name}": entries for name, entries in self.rest.items()}
        return tensors, {"names": list(self.shapes), "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The matrix of these parts."""
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


class SketchSum(Accumulator):
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top \Omega` and the diagonal.

    Args:
        parameters: over which the matrix is.
        rank: of the result.
        oversampling: columns of :math:`\Omega` beyond the rank.
        seed: of :math:`\Omega`.

    Raises:
        ValueError: the rank or the oversampling is no whole number in its range.
    """

    def __init__(self, parameters: Parameters, rank: int, oversampling: int, seed: int) -> None:
        check_count(rank, "rank")
        check_count(oversampling, "oversampling", least=0)
        self.rank = rank
        self.diagonal = DiagonalSum(parameters)
        self.shapes = shapes_of(parameters)
        first = next(iter(parameters.values()))
        size = sum(shape.numel() for shape in self.shapes.values())
        columns = min(size, rank + oversampling)
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(size, columns, generator=generator, dtype=torch.float64)
        self.omega = torch.linalg.qr(random).Q.to(first.device, accumulation_dtype(first.dtype))
        self.directions = self._by_parameter(self.omega)
        self.sketch = {name: torch.zeros_like(d) for name, d in self.directions.items()}

    def add(self, chunk: Chunk) -> None:
        """Add one chunk of pulled-back vectors."""
        for pullbacks in chunk.pullbacks():
            if not pullbacks:
                continue
            coefficients = torch.stack([p.project(self.directions) for p in pullbacks]).sum(0)
            for pullback in pullbacks:
                pullback.add_combinations(coefficients, self.sketch)
                pullback.add_squares(self.diagonal.total)

    def sums(self) -> dict[str, Tensor]:
        """The sketch and the diagonal, by parameter."""
        sums = {f"diagonal {name}": total for name, total in self.diagonal.total.items()}
        return sums | {f"sketch {name}": total for name, total in self.sketch.items()}

    def mean(self, num_examples: int) -> LowRankFisher:
        """The Nystrom approximation and the diagonal it misses."""
        image = torch.cat([t.reshape(len(t), -1) for t in self.sketch.values()], 1).T / num_examples
        image, omega = image.double(), self.omega.double()
        # A small shift keeps the inner matrix positive definite in spite of rounding.
        eps = torch.finfo(self.omega.dtype).eps
        shift = float(eps * image.norm() * image.shape[0] ** 0.5)
        shift = max(shift, torch.finfo(torch.float64).tiny ** 0.5)
        shifted = image + shift * omega
        inner = omega.T @ shifted
        factor = torch.linalg.cholesky((inner + inner.T) / 2)
        root = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        left, singular, _ = torch.linalg.svd(root, full_matrices=False)
        vectors = left[:, : self.rank].to(self.omega.dtype)
        values = (singular[: self.rank].square() - shift).clamp_min(0.0).to(self.omega.dtype)
        explained = unflatten(vectors.square() @ values, self.shapes)
        rest = {
            name: functional.relu(total / num_examples - explained[name])
            for name, total in self.diagonal.total.items()
        }
        return LowRankFisher(vectors, values, rest, num_examples)

    def _by_parameter(self, columns: Tensor) -> Parameters:
        pieces = torch.split(columns.T, [s.numel() for s in self.shapes.values()], dim=1)
        return {
            name: piece.reshape(-1, *shape).contiguous()
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
