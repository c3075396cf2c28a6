r"""The penalty of Kronecker matrices at a fraction of its cost: strong directions first.

The gradient of :math:`\tfrac12 d^\top (G \otimes A) d` for a weight of ``o`` outputs and
``i`` inputs takes ``2 o i (o + i)`` operations, several times those of a training step on a
small batch.  Along the eigenvectors :math:`A = \sum_j a_j u_j u_j^\top` it is a sum,

.. math:: G D A = \sum_j a_j \, (G D u_j) \, u_j^\top ,

and few of its terms need to be taken in every step: the smaller :math:`a_j`, the longer the
weights take to follow the pull along :math:`u_j`.  So every eigenvector has a pace: it takes part
in one step of :math:`2^l`, with :math:`2^l` times its eigenvalue, and the vectors of a pace are
spread over the steps between.  Over :data:`PERIOD` steps the matrices add up to that many times
the exact one; this is the multiple time stepping of molecular dynamics (Tuckerman, Berne and
Martyna 1992, doi:10.1063/1.463137), by stiffness.

The share of steps is proportional to :math:`\sqrt{a_j}`, as far as powers of two allow, and the
stiffest vector takes part in all.  That is the choice of least variance for a given cost where the
gradient that the loss and the penalty balance has variance :math:`a_j` along :math:`u_j`, as that
of a layer whose inputs have second moments ``A`` does; and as :math:`2^l a_j` never exceeds the
largest eigenvalue, gradient descent is stable wherever it is with the whole matrix.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ewc.consolidation.quadratic import Quadratic
from ewc.matrices.matrix import FisherMatrix, InputFactor
from ewc.parameters import Parameters

SLOWEST = 6
"""The slowest pace: one step of ``2**SLOWEST``."""

PERIOD = 2**SLOWEST
"""Steps after which every eigenvector has had its turn, and inputs up to which a layer is whole."""


class Paced:
    """Quadratics whose Kronecker products take some of their eigenvectors in each step.

    Products with dense factors, without groups and of more than :data:`PERIOD` inputs are
    paced, within block-diagonal matrices and sums too; all other matrices are taken whole in
    every step.

    Args:
        terms: the quadratics.
        share: the eigenvectors of a step, on average, as a share of all, from above 0 to 1;
            more where so few would take the stiffest too seldom.
    """

    def __init__(self, terms: Sequence[Quadratic], share: float) -> None:
        self.terms = list(terms)
        self.share = share
        self._layers: dict[int, _PacedLayer | None] = {}

    def at(self, step: int) -> list[Quadratic]:
        """The quadratics of one step; their mean over :data:`PERIOD` steps is exact.

        The turns of every period come in an order of their own, so that callers who use one
        step of two or four still see all of them in the long run.
        """
        period, place = divmod(step, PERIOD)
        # Within aligned blocks of 2**l steps, exclusive or keeps one turn of each kind.
        generator = torch.Generator().manual_seed(period)
        turn = place ^ int(torch.randint(PERIOD, (), generator=generator))
        return [
            _PacedQuadratic(term.precision, term.anchor, term.constant, paced=self, turn=turn)
            for term in self.terms
        ]

    def layer_product(self, turn: int, layer: FisherMatrix, v: Parameters) -> Parameters:
        """The product of one layer's matrix, with the eigenvectors of one turn."""
        key = id(layer)  # the terms keep their layers
        if key not in self._layers:
            factors = layer.input_factor()
            wide = factors is not None and factors.num_inputs > PERIOD
            self._layers[key] = _PacedLayer(factors, self.share) if factors and wide else None
        paced = self._layers[key]
        return layer.matvec(v) if paced is None else paced.product(v, turn)


class ScaledTerms:
    """Quadratics times a number, made once for the many steps that read them.

    Args:
        scale: the number.
        of: the quadratics.

    Attributes:
        terms: the scaled quadratics.
    """

    def __init__(self, scale: float, of: Sequence[Quadratic]) -> None:
        self.scale = scale
        self.of = list(of)
        self.terms = [
            Quadratic(scale * term.precision, term.anchor, scale * term.constant) for term in of
        ]
        self._paced: Paced | None = None

    def paced(self, share: float) -> Paced:
        """The scaled terms by paced eigenvectors, made once for a share."""
        if self._paced is None or self._paced.share != share:
            self._paced = Paced(self.terms, share)
        return self._paced


class _PacedLayer:
    """A layer whose Kronecker product takes some eigenvectors of its inputs in each step."""

    def __init__(self, factors: InputFactor, share: float) -> None:
        self._factors = factors
        values, vectors = factors.input_eigen
        # Rounding leaves the eigenvalues of a singular factor near 0, on either side.
        kept = values > torch.finfo(factors.dtype).eps * values[-1]
        pace = paces(values[kept], share * len(values))
        self._vectors = vectors[:, kept].T.to(factors.dtype).contiguous()
        self._values = (values[kept] * 2.0**pace).to(factors.dtype)
        self._turns = turns(pace)

    def product(self, v: Mapping[str, Tensor], turn: int) -> Parameters:
        """The product with the eigenvectors of one turn, from 0 to ``PERIOD - 1``."""
        chosen = self._turns[turn]
        return self._factors.product_along(v, self._values[chosen], self._vectors[chosen])


@dataclass(frozen=True, eq=False, kw_only=True)
class _PacedQuadratic(Quadratic):
    """A quadratic whose matrix is that of one turn."""

    paced: Paced
    turn: int

    def product(self, v: Parameters) -> Parameters:
        return self.precision.matvec_with(v, partial(self.paced.layer_product, self.turn))


def paces(values: Tensor, budget: float) -> Tensor:
    r"""The pace :math:`l` of every eigenvalue: it takes part in one step of :math:`2^l`.

    Args:
        values: the eigenvalues, above 0, ``[n]``.
        budget: how many shall take part in a step, on average.  More do where the largest
            eigenvalue would else not take part in all.
    """
    if not len(values):
        return torch.zeros(0, dtype=torch.long, device=values.device)
    relative = (values / values.max()).sqrt()

    def found(scale: float) -> Tensor:
        share = (math.exp(scale) * relative).clamp(max=1.0)
        return (-share.log2()).round().clamp(0, SLOWEST).long()

    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        if float((2.0 ** -found(middle).double()).sum()) > budget:
            high = middle
        else:
            low = middle
    return found(low)


def turns(pace: Tensor) -> list[Tensor]:
    """Which vectors take part in each of :data:`PERIOD` steps, shared out evenly.

    Args:
        pace: of every vector, ``[n]``.
    """
    generator = torch.Generator().manual_seed(0)
    turn = torch.zeros_like(pace, device="cpu")
    for level in range(1, SLOWEST + 1):
        # At random, so that neighbours, which matter alike, come at different times.
        mine = torch.nonzero(pace.cpu() == level)[:, 0]
        mine = mine[torch.randperm(len(mine), generator=generator)]
        turn[mine] = torch.arange(len(mine)) % 2**level
    every = 2 ** pace.cpu()
    steps = (torch.nonzero(step % every == turn)[:, 0] for step in range(PERIOD))
    return [chosen.to(pace.device) for chosen in steps]
