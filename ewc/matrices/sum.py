r"""A sum of Fisher matrices that has no closed form of its own: kept term by term."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ewc.checks import check_not_negative
from ewc.linalg.krylov import conjugate_gradients
from ewc.matrices.composite import joined_states, split_states
from ewc.matrices.matrix import FisherMatrix, State
from ewc.parameters import Parameters, Shapes, check_same_shapes, shapes_of

DENSE_LIMIT = 4096
"""Parameters up to which a dense matrix is made where no closed form is known."""


class SumFisher(FisherMatrix):
    r"""The exact sum :math:`\sum_t F_t` of matrices of any structures.

    ``matvec``, ``diagonal`` and ``trace`` cost the sum of the terms' costs; ``solve`` takes
    conjugate gradients where the matrix is large; the other verbs go through the dense
    matrix.

    Args:
        terms: matrices over the same parameters; a sum among them is taken apart.
        num_examples: the examples behind the mean; those of all terms together if ``None``.

    Raises:
        ValueError: the parameters of the terms differ.
    """

    made_by_pass = False

    def __init__(self, terms: Sequence[FisherMatrix], num_examples: int | None = None) -> None:
        self.terms: list[FisherMatrix] = []
        for term in terms:
            self.terms.extend(term.terms if isinstance(term, SumFisher) else [term])
        self.shapes = self.terms[0].shapes
        for term in self.terms[1:]:
            check_same_shapes(term.shapes, self.shapes, "The other Fisher matrix")
        together = sum(term.num_examples for term in terms)
        self.num_examples = together if num_examples is None else num_examples

    @classmethod
    def accumulator(cls, _parameters: Parameters) -> NoReturn:
        """A sum is made by ``+``, never by a pass over data.

        Raises:
            TypeError: always.
        """
        raise TypeError("SumFisher is no structure to compute: add matrices with + instead.")

    def matvec(self, v: Mapping[str, Tensor]) -> Parameters:
        """The sum of the products."""
        total = self.terms[0].matvec(v)
        for term in self.terms[1:]:
            product = term.matvec(v)
            total = {name: tensor + product[name] for name, tensor in total.items()}
        return total

    def to_dense(self) -> Tensor:
        """The sum of the dense matrices, shape ``[p, p]``."""
        order = self.shapes
        dense = [term.embedded(order).to_dense() for term in self.terms]
        return sum(dense[1:], start=dense[0])

    def diagonal(self) -> Parameters:
        """The sum of the diagonals."""
        diagonals = [term.diagonal() for term in self.terms]
        return {
            name: sum((d[name] for d in diagonals[1:]), start=diagonals[0][name])
            for name in self.shapes
        }

    def scaled(self, factor: float) -> "SumFisher":
        """Every term times ``factor``."""
        return SumFisher([term.scaled(factor) for term in self.terms], self.num_examples)

    def embedded(self, shapes: Shapes) -> "SumFisher":
        """Every term over more parameters."""
        return SumFisher([term.embedded(shapes) for term in self.terms], self.num_examples)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "SumFisher":
        """The terms, each with ``function`` applied: matrix-free ones keep their network."""
        return SumFisher([term.mapped(function) for term in self.terms], self.num_examples)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the first term."""
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the first term is."""
        return self.terms[0].device

    def check_entries(self) -> None:
        """Check the entries of every term."""
        for term in self.terms:
            term.check_entries()

    def attached(self, model: nn.Module) -> "SumFisher":
        """The terms with the network that matrix-free ones among them need."""
        return SumFisher([term.attached(model) for term in self.terms], self.num_examples)

    def solve(self, v: Mapping[str, Tensor], damping: float) -> Parameters:
        r"""The solution of :math:`(\sum_t F_t + \delta I) u = v`.

        By the dense matrix up to :data:`DENSE_LIMIT` parameters, above by conjugate
        gradients to single precision's or double precision's rounding.

        Raises:
            ValueError: ``damping`` is negative or not finite, or ``v`` does not fit.
            torch.linalg.LinAlgError: the damped matrix is not positive definite.
        """
        if self.num_parameters <= DENSE_LIMIT:
            return super().solve(v, damping)
        check_not_negative(damping, "damping")
        check_same_shapes(shapes_of(v), self.shapes, "The right-hand side")
        return conjugate_gradients(self.matvec, self.diagonal(), v, damping)

    def state(self) -> State:
        """The tensors of all terms, numbered; a description a term."""
        tensors, about = joined_states(self.terms)
        return tensors, {"terms": about, "num_examples": self.num_examples}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The sum of the terms described."""
        return cls(split_states(tensors, about["terms"]), about["num_examples"])
