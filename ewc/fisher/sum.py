r"""A sum of Fisher matrices that has no closed form of its own: kept term by term."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

from torch import Tensor

from ewc.fisher.matrix import FisherMatrix, State
from ewc.parameters import Parameters, Shapes, check_same_shapes


class SumFisher(FisherMatrix):
    r"""The exact sum :math:`\sum_t F_t` of matrices of any structures.

    ``matvec``, ``diagonal`` and ``trace`` cost the sum of the terms' costs; the other
    verbs go through the dense matrix.

    Args:
        terms: matrices over the same parameters; a sum among them is taken apart.

    Raises:
        ValueError: the parameters of the terms differ.
    """

    def __init__(self, terms: Sequence[FisherMatrix]) -> None:
        self.terms: list[FisherMatrix] = []
        for term in terms:
            self.terms.extend(term.terms if isinstance(term, SumFisher) else [term])
        self.shapes = self.terms[0].shapes
        for term in self.terms[1:]:
            check_same_shapes(term.shapes, self.shapes, "The other Fisher matrix")
        self.num_examples = sum(term.num_examples for term in self.terms)

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
        return SumFisher([term.scaled(factor) for term in self.terms])

    def embedded(self, shapes: Shapes) -> "SumFisher":
        """Every term over more parameters."""
        return SumFisher([term.embedded(shapes) for term in self.terms])

    def state(self) -> State:
        """The tensors of all terms, numbered; a description a term."""
        tensors, about = {}, []
        for index, term in enumerate(self.terms):
            inner, description = term.description()
            tensors.update({f"{index}/{key}": value for key, value in inner.items()})
            about.append(description)
        return tensors, {"terms": about}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        """The sum of the terms described."""
        terms = []
        for index, description in enumerate(about["terms"]):
            prefix = f"{index}/"
            inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            terms.append(FisherMatrix.from_description(inner, description))
        return cls(terms)
