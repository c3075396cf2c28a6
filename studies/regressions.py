r"""Generalised linear models, many of them fitted at once for simulations.

There is one design ``x`` of shape ``[n, p]`` and many draws of the targets, ``[fits, n]``.  The
outputs :math:`x \theta` are natural parameters, so that Fisher scoring is Newton's method
(McCullagh & Nelder 1989, Generalized Linear Models, section 2.5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ewc import Dense
from ewc.fisher import fisher_information
from ewc.likelihoods import Bernoulli, Likelihood, Poisson
from ewc.matrices import DenseFisher
from ewc.parameters import Parameters

MOMENTS: dict[type[Likelihood], Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    Bernoulli: lambda f: ((mean := f.sigmoid()), mean * (1 - mean)),
    Poisson: lambda f: ((mean := f.exp()), mean),
}
"""The mean and the variance of a target as functions of its output."""

STEPS = 25
"""The largest number of steps of Newton's method."""


def maxima(x: Tensor, y: Tensor, likelihood: Likelihood, held: Sequence[int] = ()) -> Tensor:
    r"""The maxima of the likelihood ``[fits, p]``, with the entries ``held`` at 0.

    Raises:
        ArithmeticError: a fit has not converged, for example as its classes can be separated.
    """
    free = [column for column in range(x.shape[1]) if column not in held]
    theta = x.new_zeros(len(y), x.shape[1])
    inputs = x[:, free]
    for _ in range(STEPS):
        mean, information = _mean_and_information(inputs, likelihood, theta[:, free])
        step = torch.linalg.solve(information, (y - mean) @ inputs)
        # No step moves an output by more than 2: the first ones would overshoot.
        largest = (step @ inputs.T).abs().amax(1, keepdim=True)
        theta[:, free] += step * (2 / largest).clamp_max(1.0)
        if float(step.abs().max()) < 1e-10:
            return theta
    raise ArithmeticError(f"A fit has not converged after {STEPS} steps of Newton's method.")


def _mean_and_information(
    x: Tensor, likelihood: Likelihood, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of every target ``[fits, n]`` and the information of all ``[fits, p, p]``."""
    mean, variance = MOMENTS[type(likelihood)](theta @ x.T)
    outer = (x[:, :, None] * x[:, None, :]).flatten(1)
    return mean, (variance @ outer).view(len(theta), x.shape[1], x.shape[1])


def covariances(
    x: Tensor, y: Tensor, likelihood: Likelihood, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """The inverse information and the sandwich of each fit, ``[fits, p, p]``."""
    mean, information = _mean_and_information(x, likelihood, theta)
    scores = (y - mean)[:, :, None] * x
    inverse = torch.linalg.inv(information)
    return inverse, inverse @ (scores.mT @ scores) @ inverse


@dataclass(frozen=True)
class Regression:
    """A generalised linear model with given coefficients.

    Attributes:
        x: the design ``[n, p]``.
        y: the targets ``[n]``.
        likelihood: the likelihood of the targets.
        theta: the coefficients ``[p]``.
    """

    x: Tensor
    y: Tensor
    likelihood: Likelihood
    theta: Tensor

    @classmethod
    def fitted(
        cls, x: Tensor, y: Tensor, likelihood: Likelihood, held: Sequence[int] = ()
    ) -> "Regression":
        """At the maximum of the likelihood, with the coefficients ``held`` at 0."""
        return cls(x, y, likelihood, maxima(x, y[None], likelihood, held)[0])

    @property
    def parameters(self) -> Parameters:
        """The coefficients, named like those of a linear layer."""
        return {"weight": self.theta[None]}

    def fisher(self, **options: Any) -> DenseFisher:
        """The information of the examples."""
        model = nn.Linear(len(self.theta), 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(self.theta)
        data = [(self.x, self.y[:, None])]
        return fisher_information(model, data, self.likelihood, structure=Dense(), **options)

    def log_likelihood(self) -> float:
        """The log-likelihood of all examples, in nats."""
        outputs = (self.x @ self.theta)[:, None]
        return float(self.likelihood.log_prob(outputs, self.y[:, None]).sum())

    def score(self) -> Parameters:
        """The gradient of the log-likelihood of all examples."""
        outputs = (self.x @ self.theta)[:, None]
        return {"weight": self.likelihood.score(outputs, self.y[:, None]).T @ self.x}
