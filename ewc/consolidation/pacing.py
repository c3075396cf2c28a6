r"""The penalty of Kronecker matrices at a fraction of its cost: stiff directions more often.

The gradient of :math:`\tfrac12 d^\top (G \otimes A) d` for a weight of ``o`` outputs and
``i`` inputs takes ``2 o i (o + i)`` operations, several times those of a training step on a
small batch.  Along the eigenvectors :math:`A = \sum_j a_j u_j u_j^\top` it is a sum,

.. math:: G D A = \sum_j a_j \, (G D u_j) \, u_j^\top ,

and few of its terms are needed in every step.  The smaller :math:`a_j`, the longer the weights
take to follow the pull along :math:`u_j`.  Every eigenvector therefore has a pace ``l``: it is used
in one of :math:`2^l` steps, with :math:`2^l` times its eigenvalue.  The vectors of one pace are
spread over the steps between.  The mean of the matrices over :data:`PERIOD` steps is the exact
matrix.  This is the multiple time stepping of molecular dynamics (Tuckerman, Berne and Martyna
1992, doi:10.1063/1.463137), by stiffness.

The fraction of steps is proportional to :math:`\sqrt{a_j}`, as far as powers of two allow, and
the stiffest vector is used in every step.  This has the least variance for a given cost if the
gradient along :math:`u_j` has variance :math:`a_j`, as in a layer whose inputs have second moments
``A``.  As :math:`2^l a_j` never exceeds the largest eigenvalue, gradient descent is stable where it
is stable with the whole matrix.

On an accelerator the whole product is faster (:func:`pays`), and every step there is exact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ewc.consolidation.quadratic import Quadratic
from ewc.linalg.devices import sizes_for
from ewc.matrices.matrix import FisherMatrix, InputFactor
from ewc.parameters import Parameters, dot

SLOWEST = 6
"""The slowest pace: one of ``2**SLOWEST`` steps."""

PERIOD = 2**SLOWEST
"""The steps in which every eigenvector is used; layers of at most as many inputs are not paced."""


def pays(device: torch.device) -> bool:
    """Whether a step with some eigenvectors takes less time than one with the whole product.

    It has fewer operations but more launches.  On an H200 a twentieth of the eigenvectors of
    784-1000-1000-10 took 2.6 naive steps and the whole product 2.0.
    """
    return not sizes_for(device).whole


class Paced:
    """Quadratics whose Kronecker products use some of their eigenvectors in each step.

    Paced are products with dense factors, without groups and of more than :data:`PERIOD` inputs,
    also within block-diagonal matrices and sums.  All other matrices are used whole in every step.

    Args:
        terms: the quadratics.
        share: average fraction of the eigenvectors used per step, in (0, 1].  It is larger where
            the stiffest eigenvector would otherwise not be used in every step.
    """

    def __init__(self, terms: Sequence[Quadratic], share: float) -> None:
        self.terms = list(terms)
        self.share = share
        self._layers: dict[int, _PacedLayer | None] = {}

    def at(self, step: int) -> list[Quadratic]:
        """The quadratics of one step; their mean over :data:`PERIOD` steps is exact.

        The order of the turns differs between periods.  A caller that uses only every second or
        fourth step still sees all of them in the long run.
        """
        period, place = divmod(step, PERIOD)
        # Exclusive or permutes the turns within aligned blocks of 2**l steps.
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
    """Quadratics times a number, computed once for the many steps that use them.

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
        """The scaled terms with paced eigenvectors, computed once per share."""
        if self._paced is None or self._paced.share != share:
            self._paced = Paced(self.terms, share)
        return self._paced


class _PacedLayer:
    """A layer whose Kronecker product uses some eigenvectors of its inputs in each step."""

    def __init__(self, factors: InputFactor, share: float) -> None:
        self._factors = factors
        values, vectors = factors.input_eigen
        # The zero eigenvalues of a singular factor are near 0, of either sign, by rounding.
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
    """A quadratic with the matrix of one turn."""

    paced: Paced
    turn: int

    def product(self, v: Parameters) -> Parameters:
        return self.precision.matvec_with(v, partial(self.paced.layer_product, self.turn))

    def form_and_product(self, here: Parameters) -> tuple[Tensor, Parameters]:
        step = self.step_to(here)
        product = self.product(step)
        return dot(step, product), product


def paces(values: Tensor, budget: float) -> Tensor:
    r"""The pace :math:`l` of every eigenvalue: it is used in one of :math:`2^l` steps.

    Args:
        values: the eigenvalues, above 0, ``[n]``.
        budget: average number of eigenvalues used per step.  It is exceeded where the largest
            eigenvalue would otherwise not be used in every step.
    """
    if not len(values):
        return torch.zeros(0, dtype=torch.long, device=values.device)
    relative = (values / values.max()).sqrt()

    def paces_at(scale: float) -> Tensor:
        share = (math.exp(scale) * relative).clamp(max=1.0)
        return (-share.log2()).round().clamp(0, SLOWEST).long()

    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        if float((2.0 ** -paces_at(middle).double()).sum()) > budget:
            high = middle
        else:
            low = middle
    return paces_at(low)


def turns(pace: Tensor) -> list[Tensor]:
    """The indices of the vectors used in each of :data:`PERIOD` steps, spread evenly.

    Args:
        pace: the pace of every vector, ``[n]``.
    """
    generator = torch.Generator().manual_seed(0)
    turn = torch.zeros_like(pace, device="cpu")
    for level in range(1, SLOWEST + 1):
        # In random order, so that neighbours with similar eigenvalues are used at different times.
        of_level = torch.nonzero(pace.cpu() == level)[:, 0]
        of_level = of_level[torch.randperm(len(of_level), generator=generator)]
        turn[of_level] = torch.arange(len(of_level)) % 2**level
    every = 2 ** pace.cpu()
    steps = (torch.nonzero(step % every == turn)[:, 0] for step in range(PERIOD))
    return [chosen.to(pace.device) for chosen in steps]
