"""The request for leading directions and the diagonal, and its sketch of the data."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ewc.checks import check_count, check_whole
from ewc.fisher.structures.diagonal import DiagonalAccumulator
from ewc.fisher.structures.structure import Accumulator, Structure
from ewc.linalg.tiles import slices
from ewc.matrices.low_rank import LowRankFisher
from ewc.parameters import (
    Parameters,
    accumulation_dtype,
    shapes_of,
)
from ewc.pullback.pullback import Chunk, Pullback

FEW_PARAMETERS = 64
"""The number of parameters up to which columns of random signs may be dependent."""


PLACES = 2**14
"""The number of parameters in one block of the sketch: some MB in double precision."""


@dataclass(frozen=True)
class LowRank(Structure[LowRankFisher]):
    """The leading directions across layers, and the exact diagonal.

    Attributes:
        rank: the number of directions, 1 or more.
        oversampling: random directions beyond the rank, 0 or more.
        seed: the seed of the random directions.

    Raises:
        ValueError: an option is not a whole number in its range.
    """

    rank: int = 20
    oversampling: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_count(self.rank, "rank")
        check_count(self.oversampling, "oversampling", least=0)
        check_whole(self.seed, "seed")

    def accumulator(self, parameters: Parameters) -> "SketchAccumulator":
        return SketchAccumulator(parameters, self.rank, self.oversampling, self.seed)


class SketchAccumulator(Accumulator[LowRankFisher]):
    r"""The running :math:`\sum_{n,k} v_{kn} v_{kn}^\top \Omega` and the diagonal.

    :math:`\Omega` consists of random signs, stored as one bit each.  They are expanded for a
    block of columns and one pullback at a time.  The vectors are computed in place of the
    first columns of the sketch, so there is never a second tensor of its size.

    Args:
        parameters: the parameters of the matrix.
        rank: the rank of the result.
        oversampling: the number of columns of :math:`\Omega` beyond the rank.
        seed: the seed of :math:`\Omega`.
    """

    def __init__(self, parameters: Parameters, rank: int, oversampling: int, seed: int) -> None:
        self.diagonal = DiagonalAccumulator(parameters)
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
        for pullbacks in chunk.pullbacks():
            if not pullbacks:
                continue
            for pullback in pullbacks:
                pullback.add_squares(self.diagonal.total)
            largest = max(sum(s.numel() for s in p.shapes.values()) for p in pullbacks)
            # The directions, their products, the combinations, and the sum of these.
            column = 4 * largest * self.kept.element_size()
            for columns in slices(self.directions.count, column, pullbacks[0].memory):
                products = [p.project(self._directions(p, columns)) for p in pullbacks]
                coefficients = sum(products[1:], start=products[0])
                for pullback in pullbacks:
                    self._add_combinations(pullback, coefficients, columns)

    def _directions(self, pullback: Pullback, columns: slice) -> Parameters:
        """A block of columns of Omega, in the parameters of a pullback."""
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
        sums = {f"diagonal {name}": total for name, total in self.diagonal.total.items()}
        return sums | {"sketch": self.kept, "rest of the sketch": self.extra}

    def mean(self, num_examples: int) -> LowRankFisher:
        r"""The Nystrom approximation and the rest of the diagonal.

        With :math:`Y = F \Omega` the approximation is :math:`B B^\top` with
        :math:`B = Y T^\top` and :math:`T^\top T = (\Omega^\top Y)^{-1}`.  The factorisation
        :math:`B = U \Sigma V^\top` follows from the small matrix :math:`B^\top B`.  All sums
        over the parameters are computed in blocks of :data:`PLACES`.
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

        # The Cholesky factor that makes the columns of Omega orthonormal.
        root = torch.linalg.cholesky(products(signs, signs))
        norm = _both_sides(root, products(image, image)).trace().clamp_min(0.0).sqrt()
        # A small shift keeps the inner matrix positive definite despite rounding errors.
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
            for block in slices(len(entries), 1, PLACES):
                place = slice(where.start + block.start, where.start + block.stop)
                vectors = (turned @ root_rows(place)).to(dtype)
                kept[:, place] = vectors
                missing = entries[block] / num_examples - values @ vectors.square()
                entries[block] = missing.clamp_min_(0.0)
            rest[name] = entries.reshape(self.shapes[name])
        return LowRankFisher(kept.T, values, rest, num_examples)


def _both_sides(factor: Tensor, matrix: Tensor) -> Tensor:
    r""":math:`L^{-1} X L^{-\top}` with a lower triangular :math:`L`."""
    left = torch.linalg.solve_triangular(factor, matrix, upper=False)
    both: Tensor = torch.linalg.solve_triangular(factor, left.T, upper=False).T
    return both


class Directions:
    r"""The random columns :math:`\Omega`: independent signs, stored as one bit each.

    If the columns are half as many as the parameters, or there are few parameters,
    :math:`\Omega` is the identity.  The sketch is then the matrix itself.

    Args:
        size: the number of parameters.
        count: the number of columns that are requested.
        seed: the seed of the signs.
        device: the device of the signs.

    Attributes:
        count: the number of columns.
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
        """A block of columns at a block of parameters, ``[columns, places]``."""
        chosen = torch.arange(columns.start, columns.stop, device=self.device)
        if self.bits is None:
            here = torch.arange(places.start, places.stop, device=self.device)
            return (chosen[:, None] == here).to(dtype)
        masks = (1 << (chosen % 8)).to(torch.uint8)
        signs = self.bits[chosen // 8, places].bitwise_and_(masks[:, None]).ne(0).to(dtype)
        return signs.mul_(2).sub_(1)
