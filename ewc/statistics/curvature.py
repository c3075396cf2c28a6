r"""The curvature of a network's log-likelihood, whose expectation is the Fisher information.

With the residuals :math:`s_n = \partial \log p(y_n \mid f_n) / \partial f_n` and the network's
own second derivatives

.. math:: - \frac1N \sum_n \nabla_\theta^2 \log p(y_n \mid f_n)
          = \frac1N \sum_n J_n^\top G_n J_n - \frac1N \sum_n \sum_c s_{nc} \nabla_\theta^2 f_{nc} ,

with :math:`G_n = - \partial^2 \log p / \partial f^2`.  The first sum is the generalised
Gauss-Newton matrix.  Where the outputs are natural parameters, :math:`G_n` is the Fisher
information of the outputs for every target, and the first sum is the Fisher information
(Martens 2020, arXiv:1412.1193, section 9.2).  The second sum is 0 for linear models, and in
expectation under the model, where the residuals have mean 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev

from ewc.fisher.estimators import Empirical, Exact, check_no_loss
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
from ewc.pullback.call import Call
from ewc.statistics.families.parametric import Formulations
from ewc.statistics.network import NetworkFunction

EXAMPLES = 256
"""The number of examples whose second derivatives are taken at once."""

ROWS = 64
"""The number of rows of a Hessian matrix that are taken at once."""


def network_formulations(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    estimator: Exact | Empirical = Exact(),
    parameters: Sequence[Selection] | None = None,
) -> Formulations:
    r"""Both formulations of a network's Fisher information, as dense matrices.

    The first is :math:`\frac1N \sum_n E[s_n s_n^\top]` with the scores :math:`s_n` of the
    parameters, the second :math:`- \frac1N \sum_n E[\nabla^2 \log p(y \mid f_n)]`.  With
    :class:`~ewc.Exact` the target ``y`` is drawn from the model, and the two are equal.  With
    :class:`~ewc.Empirical` it is the target in the data, and they differ.  The curvature under
    the model is the second derivative of a KL divergence, so the two share no formula.

    Args:
        model: the network; it runs in evaluation mode.
        data: batches, as for :func:`~ewc.fisher_information`.
        likelihood: what the outputs mean.
        estimator: decides the targets.
        parameters: a choice of parameters; ``None`` for all that require a gradient.

    Returns:
        The matrices ``[p, p]``, in nats per squared unit of the parameters.  With observed
        targets ``sandwich / N`` is the covariance of the maximum likelihood estimate, from the
        Hessian; :func:`~ewc.statistics.robust_covariance` takes the Fisher information instead.

    Raises:
        ValueError: as :func:`~ewc.fisher_information`.
        TypeError: the estimator is neither ``Exact()`` nor ``Empirical()``.
    """
    if not isinstance(estimator, Exact | Empirical):
        raise TypeError(f"estimator must be Exact() or Empirical(), got {estimator!r}.")
    check_no_loss(estimator, "network_formulations")
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

    def loss_of(arguments: Call, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """The function to be differentiated twice, summed over some examples."""
        if isinstance(estimator, Empirical):
            return lambda theta: network.losses(
                unflatten(theta, fisher.shapes), arguments, targets
            ).sum()
        outputs = network.outputs(network.parameters, arguments)
        # -E[log p] is the KL from the model as it is, up to a constant.
        weights = likelihood.combined_weights(outputs, targets)
        return lambda theta: _divergences(
            likelihood,
            outputs,
            network.outputs(unflatten(theta, fisher.shapes), arguments),
            weights,
        ).sum()

    with network.evaluating():
        for arguments, targets in network.batches(batches, use_targets=estimator.uses_targets):
            for start in range(0, len(targets), EXAMPLES):
                rows = slice(start, start + EXAMPLES)
                loss = loss_of(arguments[rows], targets[rows])
                # Backwards twice: not every operation has a right forward derivative.
                curvature += jacrev(grad(loss), chunk_size=ROWS)(flat).detach()
    curvature /= fisher.num_examples
    return Formulations(fisher.to_dense(), (curvature + curvature.T) / 2)


@dataclass(frozen=True)
class DivergenceProfile:
    r"""How far steps along a direction change a model's distribution.

    Attributes:
        steps: :math:`t`, ``[s]``.
        divergence: :math:`\frac1N \sum_n KL(p_\theta \| p_{\theta + t d})` in nats per example,
            ``[s]``: the expected fall of the log-likelihood.
        quadratic: :math:`\tfrac12 t^2 d^\top F d`, ``[s]``.
    """

    steps: Tensor
    divergence: Tensor
    quadratic: Tensor

    @property
    def error(self) -> Tensor:
        """The absolute difference of divergence and quadratic, ``[s]``."""
        return (self.divergence - self.quadratic).abs()

    @property
    def order(self) -> float:
        r"""The order of the error in the step, by least squares of logarithms.

        It is 3 for the Fisher information at :math:`\theta`, and 2 for another matrix.  It is
        NaN where the KL equals the quadratic, or all steps have one length.
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
    r"""The expected fall of the log-likelihood along a direction, and its quadratic model.

    .. math:: \frac1N \sum_n KL(p_\theta(\cdot \mid x_n) \| p_{\theta + t d}(\cdot \mid x_n))
              = \tfrac12 t^2 d^\top F d + O(t^3)

    (Kullback & Leibler 1951; Amari 2016, Information Geometry and Its Applications, section
    1.3).  Every step costs one forward pass.  In single precision a small divergence has few
    correct digits.

    Args:
        model: the network at :math:`\theta`; it runs in evaluation mode.
        data: batches, as for :func:`~ewc.fisher_information`.
        fisher: the mean information of these data, of any structure.
        likelihood: what the outputs mean.
        direction: ``d``, for example from :func:`~ewc.statistics.leading_eigenvector`.
        steps: ``t``, in units of the direction, of any sign but not 0.

    Raises:
        ValueError: the direction is not over the parameters of ``fisher``, ``steps`` is empty
            or holds 0 or an infinite number, or the data are empty or not batches.
    """
    lengths = torch.tensor(list(steps), dtype=torch.float64)
    if not len(lengths) or not bool((lengths.isfinite() & (lengths != 0)).all()):
        raise ValueError(
            f"steps must be one or more finite numbers, none of them 0, got {list(steps)}."
        )
    check_same_shapes(shapes_of(direction), fisher.shapes, "The direction")
    network = NetworkFunction(model, fisher.shapes, likelihood)
    here = network.parameters
    along = {name: direction[name].to(tensor) for name, tensor in here.items()}
    total, count = torch.zeros_like(lengths), 0
    with network.evaluating(), torch.no_grad():
        for arguments, targets in network.batches(data, use_targets=False):
            before = network.outputs(here, arguments).double()
            weights = likelihood.combined_weights(before, targets)
            for index, step in enumerate(lengths.tolist()):
                moved = {name: tensor + step * along[name] for name, tensor in here.items()}
                after = network.outputs(moved, arguments).double()
                total[index] += _divergences(likelihood, before, after, weights).sum().cpu()
            count += len(targets)
    if not count:
        raise ValueError("data must hold at least one example, got none.")
    form = float(fisher.quadratic_form({name: v.to(fisher.dtype) for name, v in along.items()}))
    return DivergenceProfile(lengths, total / count, 0.5 * lengths.square() * form)


def _divergences(
    likelihood: Likelihood, outputs: Tensor, other: Tensor, weights: Tensor | None
) -> Tensor:
    """The KL divergences ``[n]``; a likelihood without weights need not know of them."""
    if weights is None:
        return likelihood.kl(outputs, other)
    return likelihood.kl(outputs, other, weights)
