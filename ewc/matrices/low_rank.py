r"""The Fisher information as a low-rank matrix plus a diagonal."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_count, check_not_negative
from ewc.matrices.diagonal import DiagonalSum
from ewc.matrices.matrix import FisherMatrix, State
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
from ewc.pullback.accumulator import Accumulator
from ewc.pullback.pullback import Chunk, Pullback, slices

FEW_PARAMETERS = 64
"""Parameters up to which random signs may fail to be independent columns."""

PLACES = 2**14
"""Parameters over which the sketch is summed up at once: some MB in double precision."""


class LowRankFisher(FisherMatrix):
    r"""The leading directions and what they leave of the diagonal, :math:`U \Lambda U^\top + D`.

    From the pass over the data it is a randomised Nystrom approximation of rank ``r``
    (Frangella, Tropp & Udell 2023, arXiv:2110.02820, algorithm 2.1), which never exceeds
    ``F``, and the diagonal that is missing: the result has the exact diagonal and trace.
    It sees correlations between layers, which blocks do not.  One pass, whose cost is
    that of some ``2 (r + 10)`` products with ``F``, whatever the number of score vectors.

    Memory :math:`(r + 1) p`, and with the 10 columns beyond the rank ``(r + 13) p`` while
    it is computed;
    ``matvec`` :math:`4 r p` operations; ``solve`` and ``logdet``
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
        entries = self._rest
        # Column by column: the squares of all would take as much memory as the vectors.
        for value, column in zip(self.values, self.vectors.T, strict=True):
            entries.addcmul_(value * column, column)
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

    :math:`\Omega` has random signs, a bit each: written out for some columns and one pullback
    at a time, as they are needed.  So that nothing of the sketch's size is ever beside it, the
    columns up to the rank become the vectors in place.

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
        self.diagonal = DiagonalSum(parameters)
        self.shapes = shapes_of(parameters)
        first = next(iter(parameters.values()))
        size = sum(shape.numel() for shape in self.shapes.values())
        self.directions = Directions(size, rank + oversampling, seed, first.device)
        like = first.detach().new_empty(0, dtype=accumulation_dtype(first.dtype))
        kept = min(rank, self.directions.count)
        self.kept = like.new_zeros(kept, size)
        self.extra = like.new_zeros(self.directions.count - kept, size)
        ends = accumulate(shape.numel() for shape in self.shapes.values())
        self.places = {
            name: slice(end - shape.numel(), end)
            for (name, shape), end in zip(self.shapes.items(), ends, strict=True)
        }

    def add(self, chunk: Chunk) -> None:
        """Add one chunk of pulled-back vectors."""
        for pullbacks in chunk.pullbacks():
            if not pullbacks:
                continue
            for pullback in pullbacks:
                pullback.add_squares(self.diagonal.total)
            largest = max(sum(s.numel() for s in p.shapes.values()) for p in pullbacks)
            # The directions, the products of them and of the coefficients, and their sum.
            column = 4 * largest * self.kept.element_size()
            for columns in slices(self.directions.count, column, pullbacks[0].memory):
                products = [p.project(self._directions(p, columns)) for p in pullbacks]
                coefficients = sum(products[1:], start=products[0])
                for pullback in pullbacks:
                    self._add_combinations(pullback, coefficients, columns)

    def _directions(self, pullback: Pullback, columns: slice) -> Parameters:
        """Some columns of Omega in the parameters of a pullback."""
        return {
            name: self.directions.rows(columns, self.places[name], self.kept.dtype).reshape(
                -1, *shape
            )
            for name, shape in pullback.shapes.items()
        }

    def _add_combinations(self, pullback: Pullback, coefficients: Tensor, columns: slice) -> None:
        count = columns.stop - columns.start
        images = {
            name: self.kept.new_zeros(count, *shape) for name, shape in pullback.shapes.items()
        }
        pullback.add_combinations(coefficients, images)
        for name, image in images.items():
            for index, row in enumerate(image.reshape(count, -1), start=columns.start):
                self._row(index)[self.places[name]] += row

    def _row(self, column: int) -> Tensor:
        kept = len(self.kept)
        return self.kept[column] if column < kept else self.extra[column - kept]

    def sums(self) -> dict[str, Tensor]:
        """The sketch and the diagonal, by parameter."""
        sums = {f"diagonal {name}": total for name, total in self.diagonal.total.items()}
        return sums | {"sketch": self.kept, "rest of the sketch": self.extra}

    def mean(self, num_examples: int) -> LowRankFisher:
        r"""The Nystrom approximation and the diagonal it misses.

        With :math:`Y = F \Omega` it is :math:`B B^\top` with :math:`B = Y T^\top`, where
        :math:`T^\top T = (\Omega^\top Y)^{-1}`; :math:`B = U \Sigma V^\top` follows from the
        small :math:`B^\top B`.  All sums over the parameters are taken some at a time.
        """
        kept, dtype = self.kept, self.kept.dtype
        size = kept.shape[1]
        places = list(slices(size, 1, PLACES))

        def image(place: slice) -> Tensor:
            return torch.cat([kept[:, place], self.extra[:, place]]).double() / num_examples

        def signs(place: slice) -> Tensor:
            return self.directions.rows(slice(0, self.directions.count), place, torch.float64)

        def products(left: Callable[[slice], Tensor], right: Callable[[slice], Tensor]) -> Tensor:
            total = kept.new_zeros((), dtype=torch.float64)
            for place in places:
                rows = left(place)
                total = total + rows @ (rows if right is left else right(place)).T
            return total

        # The columns of Omega made orthonormal: by a root of their products.
        root = torch.linalg.cholesky(products(signs, signs))
        norm = _both_sides(root, products(image, image)).trace().clamp_min(0.0).sqrt()
        # A small shift keeps the inner matrix positive definite in spite of rounding.
        shift = float(torch.finfo(dtype).eps * norm * size**0.5)
        shift = max(shift, torch.finfo(torch.float64).tiny ** 0.5)

        def shifted(place: slice) -> Tensor:
            return image(place).add_(signs(place), alpha=shift)

        inner = _both_sides(root, products(signs, shifted))
        factor = root @ torch.linalg.cholesky((inner + inner.T) / 2)

        def root_rows(place: slice) -> Tensor:
            rows: Tensor = torch.linalg.solve_triangular(factor, shifted(place), upper=False)
            return rows

        small = products(root_rows, root_rows)
        squared, right = torch.linalg.eigh((small + small.T) / 2)
        squared = squared.flip(0)[: len(kept)].clamp_min(torch.finfo(torch.float64).tiny)
        turned = (right.flip(1)[:, : len(kept)] / squared.sqrt()).T
        values = (squared - shift).clamp_min(0.0).to(dtype)
        rest: Parameters = {}
        for name, where in self.places.items():
            entries = self.diagonal.total[name].reshape(-1)
            for part in slices(len(entries), 1, PLACES):
                place = slice(where.start + part.start, where.start + part.stop)
                vectors = (turned @ root_rows(place)).to(dtype)
                kept[:, place] = vectors
                missing = entries[part] / num_examples - values @ vectors.square()
                entries[part] = missing.clamp_min_(0.0)
            rest[name] = entries.reshape(self.shapes[name])
        return LowRankFisher(kept.T, values, rest, num_examples)


def _both_sides(factor: Tensor, matrix: Tensor) -> Tensor:
    r""":math:`L^{-1} X L^{-\top}` with a lower triangular :math:`L`."""
    left = torch.linalg.solve_triangular(factor, matrix, upper=False)
    both: Tensor = torch.linalg.solve_triangular(factor, left.T, upper=False).T
    return both


class Directions:
    r"""The random columns :math:`\Omega`: independent signs, a bit each.

    Where they would be half as many as the parameters, or those are few, the columns of the
    identity take their place: the sketch is then the matrix itself.

    Args:
        size: the number of parameters.
        count: how many columns are asked for.
        seed: of the signs.
        device: where they are.

    Attributes:
        count: how many there are.
    """

    def __init__(self, size: int, count: int, seed: int, device: torch.device) -> None:
        self.bits: Tensor | None = None
        self.count = size
        if size > max(FEW_PARAMETERS, 2 * count):
            self.count = count
            generator = torch.Generator().manual_seed(seed)
            sizes = -(-count // 8), size
            bits = torch.randint(256, sizes, dtype=torch.uint8, generator=generator)
            self.bits = bits.to(device)
        self.device = device

    def rows(self, columns: slice, places: slice, dtype: torch.dtype) -> Tensor:
        """Some columns in some of the parameters, ``[columns, places]``."""
        chosen = torch.arange(columns.start, columns.stop, device=self.device)
        if self.bits is None:
            here = torch.arange(places.start, places.stop, device=self.device)
            return (chosen[:, None] == here).to(dtype)
        masks = (1 << (chosen % 8)).to(torch.uint8)
        signs = self.bits[chosen // 8, places].bitwise_and_(masks[:, None]).ne(0).to(dtype)
        return signs.mul_(2).sub_(1)
