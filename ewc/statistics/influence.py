r"""What a training example did to the fit: influence functions (Koh & Liang 2017).

At a minimum of :math:`\frac1N \sum_i \ell_i(\theta) + \frac{\delta}{2} \|\theta - \mu\|^2`, with
:math:`\ell_i` the negative log-likelihood of example ``i``, leaving it out moves the parameters
by about

.. math:: \theta_{-i} - \theta \approx \tfrac1N (F + \delta I)^{-1} \nabla \ell_i

(arXiv:1703.04730, section 2; Cook & Weisberg 1982), with the Fisher information in place of the
Hessian: for likelihoods whose outputs are natural parameters the generalised Gauss-Newton
matrix, and the Hessian itself for linear models.  Everything else follows by the chain rule.
``F`` may have any structure: :class:`~ewc.fisher.ImplicitFisher` solves by conjugate gradients
without a matrix, :class:`~ewc.KroneckerFisher` in its eigenbasis.

The refit keeps ``1 / N`` before the sum of the others, so the decay weighs :math:`N \delta`
against that sum with the example and without.  Its first step by Newton's method takes the
example's own part out of the curvature as well:

.. math:: \theta_{-i} - \theta \approx
          \tfrac1N (F + \delta I - \tfrac1N U_i U_i^\top)^{-1} \nabla \ell_i

where :math:`U_i U_i^\top` is the example's Fisher information: ``leverage=True``
(:mod:`ewc.statistics.leverage`), which is exact where the loss is quadratic, as in a linear
regression with decay.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from ewc.likelihoods import Categorical, Likelihood
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, flatten, unflatten
from ewc.statistics.leverage import Own, each
from ewc.statistics.network import NetworkFunction
from ewc.wrappers import named_parameters

CHUNK = 256
"""Examples whose own gradients are held at once."""


def loss_gradient(
    model: nn.Module,
    data: Iterable[Any],
    fisher: FisherMatrix,
    likelihood: Likelihood = Categorical(),
) -> Parameters:
    r"""The gradient of the mean negative log-likelihood of some data, in nats.

    Args:
        model: the network, in evaluation mode inside.
        data: batches, as :func:`~ewc.fisher_information` takes them.
        fisher: names the parameters.
        likelihood: what the outputs mean.

    Raises:
        ValueError: the data are empty or no batches.
    """
    network = NetworkFunction(model, fisher.shapes, likelihood)
    total = {name: torch.zeros_like(tensor) for name, tensor in network.parameters.items()}
    count = 0
    with network.evaluating():
        for arguments, targets in network.batches(data):
            found = grad(lambda p, a=arguments, y=targets: network.losses(p, a, y).sum())(
                network.parameters
            )
            total = {name: total[name] + found[name] for name in total}
            count += len(targets)
    if not count:
        raise ValueError("The data are empty: there is no loss to take the gradient of.")
    return {name: tensor / count for name, tensor in total.items()}


def influence(
    model: nn.Module,
    train: Iterable[Any],
    gradient: Parameters,
    fisher: FisherMatrix,
    likelihood: Likelihood = Categorical(),
    *,
    damping: float = 0.0,
    leverage: bool = False,
) -> Tensor:
    r"""How a quantity changes when each training example is left out, one by one.

    For a quantity :math:`q(\theta)` the first-order change
    :math:`\frac1N \nabla q^\top (F + \delta I)^{-1} \nabla \ell_i`: of the loss on test
    examples with :func:`loss_gradient`, of a prediction or a parameter with its gradient.
    One solve, and one forward derivative of the losses a batch.

    Args:
        model: the network, at its fit.
        train: batches of the training set, in the order of the result.
        gradient: :math:`\nabla q`.
        fisher: the mean information of the training set; its ``num_examples`` is ``N``.
        likelihood: what the outputs mean.
        damping: :math:`\delta`: the weight decay of the mean loss, at least.
        leverage: take the example's own curvature out of the matrix too, which turns the first
            order into one step of Newton's method, for ``K + 1`` solves an example.
            ``fisher`` must hold that curvature, as an exact matrix of the training set does.

    Returns:
        The changes ``[n]``, in the units of ``q``. Of a loss: positive where the example
        helps, negative where it harms.

    Raises:
        ValueError: the gradient is not over the parameters of ``fisher``, or the data are
            no batches.
        torch.linalg.LinAlgError: the damped matrix is singular, or with ``leverage`` an
            example holds more curvature than it.
    """
    network = NetworkFunction(model, fisher.shapes, likelihood)
    if leverage:
        inverse = fisher.damped_inverse(damping)
        along = flatten({name: gradient[name].to(fisher.dtype) for name in fisher.shapes})
        found = [own.moves(inverse, fisher) @ along for own in each(network, train, fisher)]
        return torch.cat(found) / fisher.num_examples
    direction = fisher.solve(gradient, damping)
    direction = {name: direction[name].to(t) for name, t in network.parameters.items()}
    changes = []
    with network.evaluating():
        for arguments, targets in network.batches(train):
            _, along, *_ = jvp(
                lambda p, a=arguments, y=targets: network.losses(p, a, y),
                (network.parameters,),
                (direction,),
            )
            changes.append(along.detach())
    return torch.cat(changes) / fisher.num_examples


def self_influence(
    model: nn.Module,
    train: Iterable[Any],
    fisher: FisherMatrix,
    likelihood: Likelihood = Categorical(),
    *,
    damping: float = 0.0,
    leverage: bool = False,
) -> Tensor:
    r"""How the loss of each training example rises when it is left out itself.

    :math:`\frac1N \nabla \ell_i^\top (F + \delta I)^{-1} \nabla \ell_i`, 0 or above: large
    for examples that nothing else in the training set explains, wrong labels among them.

    Args:
        model: the network, at its fit.
        train: batches of the training set, in the order of the result.
        fisher: the mean information of the training set.
        likelihood: what the outputs mean.
        damping: :math:`\delta`.
        leverage: take the example's own curvature out of the matrix too, which turns the first
            order into one step of Newton's method, for ``K + 1`` solves an example.
            ``fisher`` must hold that curvature, as an exact matrix of the training set does.

    Returns:
        The rises ``[n]``, in nats.

    Raises:
        ValueError: the data are no batches.
        torch.linalg.LinAlgError: the damped matrix is singular, or with ``leverage`` an
            example holds more curvature than it.
    """
    network = NetworkFunction(model, fisher.shapes, likelihood)
    rises = []
    if leverage:
        inverse = fisher.damped_inverse(damping)
        for example in each(network, train, fisher):
            rises.append((example.gradients * example.moves(inverse, fisher)).sum(1).double())
        return torch.cat(rises) / fisher.num_examples
    with network.evaluating():
        for arguments, targets in network.batches(train):
            for start in range(0, len(targets), CHUNK):
                part = slice(start, start + CHUNK)
                gradients = network.gradients(arguments[part], targets[part])
                own = {name: g.to(fisher.dtype) for name, g in gradients.items()}
                rises.append(fisher.inverse_quadratic_forms(own, damping).double())
    return torch.cat(rises) / fisher.num_examples


def parameters_without(
    model: nn.Module,
    examples: Iterable[Any],
    fisher: FisherMatrix,
    likelihood: Likelihood = Categorical(),
    *,
    damping: float = 0.0,
    leverage: bool = False,
) -> Parameters:
    r"""The parameters as they would be without some training examples, to first order.

    :math:`\theta + \frac1N (F + \delta I)^{-1} \sum_{i} \nabla \ell_i`.

    Args:
        model: the network, at its fit.
        examples: batches of what is left out.
        fisher: the mean information of the training set.
        likelihood: what the outputs mean.
        damping: :math:`\delta`.
        leverage: take the examples' own curvature out of the matrix too, which turns the first
            order into one step of Newton's method, for ``K`` solves an example and one more.
            ``fisher`` must hold that curvature, as an exact matrix of the training set does.

    Raises:
        ValueError: there are no examples.
        torch.linalg.LinAlgError: the damped matrix is singular, or with ``leverage`` an
            example holds more curvature than it.
    """
    batches = list(examples)
    own = dict(named_parameters(model))
    if leverage:
        network = NetworkFunction(model, fisher.shapes, likelihood)
        parts = list(each(network, batches, fisher))
        if not parts:
            raise ValueError("There are no examples to leave out.")
        # As one example: the sum of the losses, and all the vectors.
        gradient = torch.cat([part.gradients for part in parts]).sum(0, keepdim=True)
        vectors = torch.cat([part.vectors.flatten(0, 1) for part in parts])[None]
        (move,) = Own(gradient, vectors).moves(fisher.damped_inverse(damping), fisher)
        moved = unflatten(move / fisher.num_examples, fisher.shapes)
        return {n: own[n].detach() + t.to(own[n]) for n, t in moved.items()}
    mean = loss_gradient(model, batches, fisher, likelihood)
    share = sum(len(batch[1]) for batch in batches) / fisher.num_examples
    moved = fisher.solve({n: t.to(fisher.dtype) for n, t in mean.items()}, damping)
    return {n: own[n].detach() + share * t.to(own[n]) for n, t in moved.items()}
