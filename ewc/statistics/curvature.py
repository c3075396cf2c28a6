r"""The curvature of a network's log-likelihood, which the Fisher information is in expectation.

With the residuals :math:`s_n = \partial \log p(y_n \mid f_n) / \partial f_n` and the network's
own second derivatives

.. math:: - \frac1N \sum_n \nabla_\theta^2 \log p(y_n \mid f_n)
          = \frac1N \sum_n J_n^\top G_n J_n - \frac1N \sum_n \sum_c s_{nc} \nabla_\theta^2 f_{nc} ,

with :math:`G_n = - \partial^2 \log p / \partial f^2`.  Where the outputs are natural parameters
:math:`G_n` is the Fisher information of the outputs whatever the target, so that the first sum,
the generalised Gauss-Newton matrix, is the Fisher information (Martens 2020,
arXiv:1412.1193, section 9.2).  The second is 0 for linear models, and in expectation under the
model, where the residuals have mean 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev

from ewc.fisher.estimators import Empirical, Exact
from ewc.fisher.information import fisher_information
from ewc.fisher.structures.dense import Dense
from ewc.likelihoods import Categorical, Likelihood
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import (
    Parameters,
    Selection,
    check_same_shapes,
    flatten,
    shapes_of,
    unflatten,
)
from ewc.pullback.arguments import Arguments
from ewc.statistics.network import NetworkFunction
from ewc.statistics.parametric import Formulations

EXAMPLES = 256
"""Examples whose second derivatives are taken at once."""

ROWS = 64
"""Rows of a Hessian matrix that are taken at once."""


def network_formulations(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    estimator: Exact | Empirical = Exact(),
    parameters: Sequence[Selection] | None = None,
) -> Formulations:
    r"""Both formulations of a network's Fisher information, as dense matrices.

    :math:`\frac1N \sum_n E[s_n s_n^\top]` with the scores :math:`s_n` of the parameters, and
    :math:`- \frac1N \sum_n E[\nabla^2 \log p(y \mid f_n)]`, where ``y`` is the model's own with
    :class:`~ewc.Exact` (the two are equal), and the target in the data with
    :class:`~ewc.Empirical` (they are not).  The curvature under the model is the second
    derivative of the KL from it, in which no Jacobian is squared: the two share no formula.

    Args:
        model: the network, in evaluation mode inside.
        data: batches, as :func:`~ewc.fisher_information` takes them.
        likelihood: what the outputs mean.
        estimator: whose targets.
        parameters: some of the parameters; all that require a gradient if ``None``.

    Returns:
        The matrices ``[p, p]``, in nats per squared unit of the parameters.  With observed
        targets ``sandwich / N`` is the covariance of the maximum of the likelihood, with the
        Hessian matrix itself, where :func:`~ewc.statistics.robust_covariance` has the Fisher
        information in its place.

    Raises:
        ValueError: as :func:`~ewc.fisher_information`.
        TypeError: the estimator is neither.
    """
    if not isinstance(estimator, Exact | Empirical):
        raise TypeError(f"{estimator!r} has no expected curvature: Exact() and Empirical() have.")
    batches = list(data)
    fisher = fisher_information(
        model,
        batches,
        likelihood,
        estimator=estimator,
        structure=Dense(),
        parameters=parameters,
    )
    network = NetworkFunction(model, fisher.shapes, likelihood)
    flat = flatten(network.parameters)
    curvature = torch.zeros_like(fisher.to_dense())

    def loss_of(arguments: Arguments, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """What is to be differentiated twice, summed over some examples."""
        if isinstance(estimator, Empirical):
            return lambda theta: network.losses(
                unflatten(theta, fisher.shapes), arguments, targets
            ).sum()
        own = network.outputs(network.parameters, arguments)
        # -E[log p] is the KL from the model as it is, up to a constant.
        return lambda theta: likelihood.kl(
            own, network.outputs(unflatten(theta, fisher.shapes), arguments)
        ).sum()

    with network.evaluating():
        for arguments, targets in network.batches(batches, use_targets=estimator.uses_targets):
            for start in range(0, len(targets), EXAMPLES):
                part = slice(start, start + EXAMPLES)
                loss = loss_of(arguments[part], targets[part])
                # Backwards twice: not every operation has a right forward derivative.
                curvature += jacrev(grad(loss), chunk_size=ROWS)(flat).detach()
    curvature /= fisher.num_examples
    return Formulations(fisher.to_dense(), (curvature + curvature.T) / 2)


@dataclass(frozen=True)
class DivergenceProfile:
    r"""What steps along a direction change of a model's distribution.

    Attributes:
        steps: :math:`t`, ``[s]``.
        divergence: :math:`\frac1N \sum_n KL(p_\theta \| p_{\theta + t d})` in nats an example,
            ``[s]``: how far the log-likelihood is expected to fall.
        quadratic: :math:`\tfrac12 t^2 d^\top F d`, ``[s]``.
    """

    steps: Tensor
    divergence: Tensor
    quadratic: Tensor

    @property
    def error(self) -> Tensor:
        """The distance of the two, ``[s]``."""
        return (self.divergence - self.quadratic).abs()

    @property
    def order(self) -> float:
        r"""The power of the step that the error falls with, by least squares of logarithms.

        3 for the Fisher information at :math:`\theta`, 2 for a matrix that is not; NaN where
        the KL is the quadratic, or there is one length of step.
        """
        x, y = self.steps.abs().log(), self.error.log()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())


def divergence_profile(
    model: nn.Module,
    data: Iterable[Any],
    fisher: FisherMatrix,
    likelihood: Likelihood = Categorical(),
    *,
    direction: Parameters,
    steps: Sequence[float],
) -> DivergenceProfile:
    r"""How far the log-likelihood is expected to fall along a direction, and the quadratic.

    .. math:: \frac1N \sum_n KL(p_\theta(\cdot \mid x_n) \| p_{\theta + t d}(\cdot \mid x_n))
              = \tfrac12 t^2 d^\top F d + O(t^3)

    (Kullback & Leibler 1951; Amari 2016, Information Geometry and Its Applications, section
    1.3).  One pass forwards a step; the outputs of a network in single precision have few
    digits of a small divergence.

    Args:
        model: the network at :math:`\theta`, in evaluation mode inside.
        data: batches, as :func:`~ewc.fisher_information` takes them.
        fisher: the mean information of these data, of any structure.
        likelihood: what the outputs mean.
        direction: ``d``, an eigenvector for example (:func:`~ewc.statistics.leading_eigenvector`).
        steps: ``t``, in units of the direction, of both signs and none of them 0.

    Raises:
        ValueError: the direction is not over the parameters of ``fisher``, a step is 0 or not
            finite or there is none, or the data are empty or no batches.
    """
    lengths = torch.tensor(list(steps), dtype=torch.float64)
    if not len(lengths) or not bool((lengths.isfinite() & (lengths != 0)).all()):
        raise ValueError(
            f"steps are {list(steps)}: they must be one or more finite numbers, not 0."
        )
    check_same_shapes(shapes_of(direction), fisher.shapes, "The direction")
    network = NetworkFunction(model, fisher.shapes, likelihood)
    here = network.parameters
    own = {name: direction[name].to(tensor) for name, tensor in here.items()}
    total, count = torch.zeros_like(lengths), 0
    with network.evaluating(), torch.no_grad():
        for arguments, targets in network.batches(data, use_targets=False):
            before = network.outputs(here, arguments).double()
            for index, step in enumerate(lengths.tolist()):
                there = {name: tensor + step * own[name] for name, tensor in here.items()}
                after = network.outputs(there, arguments).double()
                total[index] += likelihood.kl(before, after).sum().cpu()
            count += len(targets)
    if not count:
        raise ValueError("The data are empty: there is no divergence to take the mean of.")
    form = float(fisher.quadratic_form({name: v.to(fisher.dtype) for name, v in own.items()}))
    return DivergenceProfile(lengths, total / count, 0.5 * lengths.square() * form)
