r"""Shortest paths of the Fisher metric, where no closed form is known.

A path from :math:`a` to :math:`b` with coefficients :math:`c_k` and integrals :math:`\phi_k` of
Legendre polynomials, which are 0 at both ends,

.. math:: \theta(t) = a + t\, (b - a) + \sum_{k=1}^K c_k \phi_k(t) ,

is the geodesic where it has the least energy :math:`\tfrac12 \int \dot\theta^\top F(\theta)\,
\dot\theta \, dt` (do Carmo 1992, Riemannian Geometry, chapter 9).  The energy is integrated by
Gauss's quadrature and minimised by Newton's method.  An error of the path changes its length in
second order only, and geodesics are analytic.  So about ten polynomials give ten digits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss, legvander
from torch import Tensor
from torch.distributions import Distribution
from torch.func import jacfwd, jacrev, vmap

from ewc.checks import check_count, check_positive
from ewc.parameters import Parameters, Shapes, check_same_shapes, flatten, shapes_of, unflatten
from ewc.statistics.families.metric import Metric, fisher_metric
from ewc.statistics.families.validation import validation

FEWEST, MOST = 6, 192
"""The first and the last number of polynomials; it is doubled in between."""

REACH = 0.7
"""The largest move of a point in a step of Newton's method, in units of the metric."""

STEPS = 60
"""The largest number of steps of Newton's method, for each number of polynomials."""

DAMPINGS = (0.0, *(4.0**k for k in range(-6, 20)))
"""Multiples of the metric to add to the Hessian, tried one after the other."""

ENOUGH = 1e-12
"""The relative gain in energy below which no further step is taken."""


@dataclass(frozen=True)
class Geodesic:
    r"""A shortest path between two members of a family.

    Attributes:
        distance: the length, in the square root of nats.
        path: the parameters at equal steps along the path, ``[points, ...]`` by name.
    """

    distance: float
    path: Parameters


def geodesic(
    metric: Metric,
    start: Parameters,
    end: Parameters,
    *,
    num_points: int = 33,
    tolerance: float = 1e-9,
) -> Geodesic:
    r"""The geodesic of a metric between two points, numerically.

    The straight line between them is bent until its energy is least.  Polynomials are added
    until the length no longer changes.  With a metric in closed form::

        path = geodesic(
            lambda p: torch.diag(torch.stack([1 / p["s"] ** 2, 2 / p["s"] ** 2])),
            {"m": torch.tensor(0.0), "s": torch.tensor(1.0)},
            {"m": torch.tensor(2.0), "s": torch.tensor(1.0)},
        )

    Args:
        metric: twice differentiable by torch, and fit for ``torch.vmap``.  For a family it is
            :func:`fisher_metric`.
        start: the parameters at the start.
        end: the parameters at the end.  The metric must be positive on the straight line
            between the two.
        num_points: the number of points of the returned path, 2 or more.
        tolerance: the relative tolerance of the length.

    Raises:
        ValueError: names or shapes differ, there are fewer than 2 points, or the tolerance is
            not above 0.
        ArithmeticError: no geodesic was found: the metric is singular or infinite on the way,
            or the path too bent for the polynomials.
    """
    check_count(num_points, "num_points", least=2)
    check_positive(tolerance, "tolerance")
    shapes = shapes_of(start)
    check_same_shapes(shapes_of(end), shapes, "The end")
    ends = torch.stack([flatten({n: p[n] for n in shapes}).detach().double() for p in (start, end)])
    energy = _Energy(metric, shapes, ends)
    coefficients = torch.zeros(0, ends.shape[1], dtype=torch.float64)
    size, before = FEWEST, float("nan")
    while size <= MOST:
        new = coefficients.new_zeros(size - len(coefficients), ends.shape[1])
        coefficients, converged = energy.minimum(torch.cat([coefficients, new]))
        length = energy.length(coefficients)
        if converged and abs(length - before) <= tolerance * length:
            times = torch.linspace(0, 1, num_points, dtype=torch.float64)
            points, _ = _along(ends, coefficients, times)
            path = vmap(lambda point: unflatten(point, shapes))(points)
            return Geodesic(length, path)
        size, before = 2 * size, length
    raise ArithmeticError(
        f"No geodesic was found: with {MOST} polynomials the length {length:g} still changes "
        "by more than the tolerance; take other parameters, such as logarithms."
    )


def geodesic_distance(
    family: Callable[[Parameters], Distribution], start: Parameters, end: Parameters
) -> float:
    r"""The Fisher-Rao distance of two members of a family, numerically, to about nine digits.

    It serves families without a closed form in :func:`~ewc.statistics.fisher_rao_distance`:
    Gamma, Beta, Dirichlet, multivariate normal and all others with a divergence in
    ``torch.distributions``.  The distance does not depend on the choice of parameters::

        family = lambda p: Gamma(p["shape"], p["rate"])
        geodesic_distance(family, first, second)

    Args:
        family: from parameters to a distribution.
        start: the parameters of one distribution.
        end: the parameters of the other.

    Raises:
        ValueError: names or shapes differ, parameters are not allowed, or the support or the
            transform of the variable depends on them.
        NotImplementedError: ``torch.distributions`` has no divergence of the family.
        ArithmeticError: no geodesic was found.
    """
    with validation(True):
        for parameters in (start, end):
            family({name: tensor.detach().double() for name, tensor in parameters.items()})
    metric = fisher_metric(family)
    metric({name: tensor.detach().double() for name, tensor in start.items()})
    return geodesic(metric, start, end).distance


class _Energy:
    r"""The energy of paths between two points, by their coefficients ``[k, p]``."""

    def __init__(self, metric: Metric, shapes: Shapes, ends: Tensor) -> None:
        self.ends = ends

        def local(state: Tensor) -> Tensor:
            """Half the squared speed at a point ``[2, p]`` and its velocity."""
            point, velocity = state
            squared: Tensor = velocity @ metric(unflatten(point, shapes)) @ velocity
            return squared / 2

        def twice(state: Tensor) -> tuple[Tensor, Tensor]:
            slope: Tensor = jacrev(local)(state)
            return slope, slope

        self.local = vmap(local)
        self.expansion = vmap(jacfwd(twice, has_aux=True))

    def minimum(self, coefficients: Tensor) -> tuple[Tensor, bool]:
        """The coefficients of least energy, from those given, and whether they are.

        Raises:
            ArithmeticError: the metric is singular or not finite on the way.
        """
        times, weights = _gauss(len(coefficients))
        basis = torch.stack(_basis(len(coefficients), times), 1)  # [q, 2, k]
        for _ in range(STEPS):
            states = torch.stack(_along(self.ends, coefficients, times), 1)
            curvature, slope = self.expansion(states)
            gradient = torch.einsum("q,qak,qai->ki", weights, basis, slope)
            hessian = torch.einsum("q,qak,qaibj,qbl->kilj", weights, basis, curvature, basis)
            matrices = curvature[:, 1, :, 1]
            constant = torch.einsum(
                "q,qk,qij,ql->kilj", weights, basis[:, 1], matrices, basis[:, 1]
            )
            newton = _Newton(gradient, hessian, constant)
            # Half the squared speed is homogeneous of degree 2 in the velocity.
            energy = float(weights @ (slope[:, 1] * states[:, 1]).sum(1)) / 2
            if newton.gain <= ENOUGH * energy:
                return coefficients, True
            for damping in DAMPINGS:
                step = newton.step(damping)
                moved = basis[:, 0] @ step
                squares = torch.einsum("qi,qij,qj->q", moved, matrices, moved)
                # A point that moves by less than its distance from an edge stays inside.
                if float(squares.max()) > REACH**2:
                    continue
                bound = energy + 1e-4 * float((gradient * step).sum())
                if self._below(coefficients + step, bound):
                    coefficients = coefficients + step
                    break
            else:
                return coefficients, False
        return coefficients, False

    def length(self, coefficients: Tensor) -> float:
        """The length of the path."""
        times, weights = _gauss(len(coefficients))
        states = torch.stack(_along(self.ends, coefficients, times), 1)
        return float(weights @ (2 * self.local(states)).clamp_min(0).sqrt())

    def _below(self, coefficients: Tensor, bound: float) -> bool:
        times, weights = _gauss(len(coefficients))
        states = torch.stack(_along(self.ends, coefficients, times), 1)
        values = self.local(states)
        return bool((values >= 0).all()) and float(weights @ values) <= bound


class _Newton:
    """Newton's steps with the absolute values of curvatures relative to the metric.

    Absolute values lead downhill out of regions that are not convex (Dauphin et al. 2014,
    arXiv:1406.2572).

    Args:
        gradient: ``[k, p]``.
        hessian: ``[k, p, k, p]``.
        constant: the Hessian for a constant metric.

    Raises:
        ArithmeticError: the metric is singular or not finite.
    """

    def __init__(self, gradient: Tensor, hessian: Tensor, constant: Tensor) -> None:
        self.shape = gradient.shape
        size = gradient.numel()
        self.factor, failed = torch.linalg.cholesky_ex(constant.reshape(size, size))
        if int(failed) or not bool(hessian.isfinite().all()):
            raise ArithmeticError(
                "No geodesic was found: the metric is singular or infinite on the way."
            )
        left = self._whitened(hessian.reshape(size, size))
        curvatures, self.vectors = torch.linalg.eigh(self._whitened(left.T))
        self.curvatures = curvatures.abs().clamp_min(1e-6)
        self.slopes = self.vectors.T @ self._whitened(gradient.reshape(size, 1))[:, 0]
        self.gain = float((self.slopes.square() / self.curvatures).sum() / 2)
        """The height of the energy above its minimum, for a quadratic energy."""

    def step(self, damping: float) -> Tensor:
        """The step with a multiple of the metric added to the Hessian, ``[k, p]``."""
        white = self.vectors @ (self.slopes / (self.curvatures + damping))
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, white[:, None], upper=True)
        return -solved.view(self.shape)

    def _whitened(self, columns: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve_triangular(self.factor, columns, upper=False)
        return solved


def _gauss(size: int) -> tuple[Tensor, Tensor]:
    """The times and weights of a quadrature over [0, 1] for paths with ``size`` terms."""
    places, weights = leggauss(2 * size + 8)
    return torch.from_numpy((places + 1) / 2), torch.from_numpy(weights / 2)


def _basis(size: int, times: Tensor) -> tuple[Tensor, Tensor]:
    r"""The polynomials :math:`\phi_k` and their derivatives, orthonormal, ``[times, size]``."""
    legendre = torch.from_numpy(legvander(2 * times.numpy() - 1, size + 1))
    scale = torch.from_numpy(np.sqrt(2 * np.arange(1, size + 1) + 1))
    values = (legendre[:, 2:] - legendre[:, :-2]) / (2 * scale)
    return values, legendre[:, 1:-1] * scale


def _along(ends: Tensor, coefficients: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The points and velocities ``[times, p]`` of a path."""
    values, slopes = _basis(len(coefficients), times)
    straight = ends[1] - ends[0]
    points = ends[0] + times[:, None] * straight + values @ coefficients
    return points, straight + slopes @ coefficients
