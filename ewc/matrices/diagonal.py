r"""The diagonal of the Fisher information: one number per parameter."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ewc.checks import check_not_negative
from ewc.linalg.weighted_square import weighted_square
from ewc.matrices.matrix import FisherMatrix, State
from ewc.parameters import (
    Parameters,
    Shapes,
    check_same_shapes,
    flatten,
    padded,
    shapes_of,
)


class DiagonalFisher(FisherMatrix):
    r"""The matrix :math:`\mathrm{diag}(F)`, zero off the diagonal.

    Memory ``p``; every verb costs ``O(p)``.

    Args:
        diagonal: the entries, by parameter.
        num_examples: the examples behind the mean.
    """

    def __init__(self, diagonal: Parameters, num_examples: int) -> None:
        self._diagonal = diagonal
        self.shapes = shapes_of(diagonal)
        self.num_examples = num_examples

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        check_same_shapes(shapes_of(v), self.shapes, "The vector")
        vectors = [v[name] for name in self._diagonal]
        products = torch._foreach_mul(list(self._diagonal.values()), vectors)
        return dict(zip(self._diagonal, products, strict=True))

    def form_and_product(self, here: Parameters, anchor: Parameters) -> tuple[Tensor, Parameters]:
        return weighted_square(here, anchor, self._diagonal)

    def diagonal(self) -> Parameters:
        return {name: entries.clone() for name, entries in self._diagonal.items()}

    def to_dense(self) -> Tensor:
        return torch.diag(flatten(self._diagonal))

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The entries :math:`v_p / (F_p + \delta)`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: an entry plus the damping is 0.
        """
        damped = self._damped_entries(damping)
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        return {name: v[name] / entries for name, entries in damped.items()}

    def inverse_quadratic_forms(self, v: Mapping[str, Tensor], damping: float) -> Tensor:
        r"""The scalars :math:`\sum_p v_{np}^2 / (F_p + \delta)`.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: an entry plus the damping is 0.
        """
        damped = self._damped_entries(damping)
        rows = self._checked_rows(v)
        forms = [(rows[n].square() / entries).flatten(1).sum(1) for n, entries in damped.items()]
        return torch.stack(forms).sum(0)

    def inverse_diagonal(self, damping: float) -> Parameters:
        r"""The entries :math:`1 / (F_p + \delta)`.

        Raises:
            ValueError: ``damping`` is negative or not finite.
            torch.linalg.LinAlgError: an entry plus the damping is 0.
        """
        return self.solve({n: torch.ones_like(t) for n, t in self._diagonal.items()}, damping)

    def _damped_entries(self, damping: float) -> Parameters:
        check_not_negative(damping, "damping")
        damped = {name: entries + damping for name, entries in self._diagonal.items()}
        for name, entries in damped.items():
            if not bool((entries > 0).all()):
                raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                    "damping must be above 0, as the diagonal Fisher matrix is 0 in parameter "
                    f"{name!r}; got {damping!r}."
                )
        return damped

    def logdet(self, damping: float) -> Tensor:
        r""":math:`\sum_p \log (F_p + \delta)`.

        Raises:
            ValueError: ``damping`` is negative or not finite.
        """
        check_not_negative(damping, "damping")
        return (flatten(self._diagonal) + damping).log().sum()

    def eigenvalues(self) -> Tensor:
        return flatten(self._diagonal).sort().values

    def largest_eigenvalue(self, steps: Mapping[str, float] | None = None) -> float:
        largest = {n: float(d.max()) for n, d in self.diagonal().items() if d.numel()}
        return max((v if steps is None else steps[n] * v for n, v in largest.items()), default=0.0)

    def scaled(self, factor: float) -> "DiagonalFisher":
        entries = {name: factor * entries for name, entries in self._diagonal.items()}
        return DiagonalFisher(entries, self.num_examples)

    def __add__(self, other: FisherMatrix) -> FisherMatrix:
        """The sum; diagonal if both matrices are."""
        if not isinstance(other, DiagonalFisher):
            return super().__add__(other)
        check_same_shapes(other.shapes, self.shapes, "The other Fisher matrix")
        entries = {n: entries + other._diagonal[n] for n, entries in self._diagonal.items()}
        return DiagonalFisher(entries, self.num_examples + other.num_examples)

    def embedded(self, shapes: Shapes) -> "DiagonalFisher":
        return DiagonalFisher(padded(self._diagonal, shapes), self.num_examples)

    @property
    def has_units(self) -> bool:
        return True

    def _shrunk(self, amount: float) -> "DiagonalFisher":
        entries = {
            name: (1 - amount) * tensor + amount * tensor.mean(0, keepdim=True)
            if tensor.dim()
            else tensor
            for name, tensor in self._diagonal.items()
        }
        return DiagonalFisher(entries, self.num_examples)

    def resolvent(self, v: Mapping[str, Tensor], steps: Mapping[str, Tensor | float]) -> Parameters:
        return {
            name: tensor / (1 + steps.get(name, 0.0) * self._diagonal[name])
            for name, tensor in v.items()
        }

    def state(self) -> State:
        return self._diagonal, {"names": list(self.shapes), "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        return cls({name: tensors[name] for name in about["names"]}, about["num_examples"])
