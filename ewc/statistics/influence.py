r"""How a training example changed the fit: influence functions (Koh & Liang 2017).

At a minimum of :math:`\frac1N \sum_i \ell_i(\theta) + \frac{\delta}{2} \|\theta - \mu\|^2`, with
:math:`\ell_i` the negative log-likelihood of example ``i``, leaving it out moves the parameters
by about

.. math:: \theta_{-i} - \theta \approx \tfrac1N (F + \delta I)^{-1} \nabla \ell_i

(arXiv:1703.04730, section 2; Cook & Weisberg 1982).  The Fisher information stands in place of
the Hessian.  Where the outputs are natural parameters it is the generalised Gauss-Newton matrix,
and for linear models the Hessian itself.  Everything else follows by the chain rule.  ``F`` may
have any structure: :class:`~ewc.fisher.ImplicitFisher` solves by conjugate gradients without a
matrix, :class:`~ewc.KroneckerFisher` in its eigenbasis.

The refit keeps ``1 / N`` before the sum over the remaining examples, so the decay weighs
:math:`N \delta` against that sum with the example and without it.  The first step of Newton's
method also takes the example out of the curvature:

.. math:: \theta_{-i} - \theta \approx
          \tfrac1N (F + \delta I - \tfrac1N U_i U_i^\top)^{-1} \nabla \ell_i

where :math:`U_i U_i^\top` is the example's Fisher information.  This is ``leverage=True``
(:mod:`ewc.statistics.leverage`).  It is exact where the loss is quadratic, as in a linear
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
from ewc.statistics.leverage import ExampleVectors, example_vectors
from ewc.statistics.network import NetworkFunction
from ewc.wrappers import named_parameters

CHUNK = 256
"""The number of examples whose gradients are in memory at once."""


def loss_gradient(
    model: nn.Module,
    data: Iterable[Any],
    fisher: FisherMatrix,
    likelihood: Likelihood = Categorical(),
) -> Parameters:
    r"""The gradient of the mean negative log-likelihood of some data, in nats.

    Args:
        model: the network; it runs in evaluation mode.
        data: batches, as for :func:`~ewc.fisher_information`.
        fisher: a matrix over the parameters of the gradient.
        likelihood: what the outputs mean.

    Raises:
        ValueError: the data are empty or not batches.
    """
    total, count = _summed_gradient(model, data, fisher, likelihood)
    return {name: tensor / count for name, tensor in total.items()}


def _summed_gradient(
    model: nn.Module, data: Iterable[Any], fisher: FisherMatrix, likelihood: Likelihood
) -> tuple[Parameters, int]:
    """The gradient of the sum of all losses, and the number of examples."""
    network = NetworkFunction(model, fisher.shapes, likelihood)
    total = {name: torch.zeros_like(tensor) for name, tensor in network.parameters.items()}
    count = 0
    with network.evaluating():
        for arguments, targets in network.batches(data):
            summed = grad(lambda p, a=arguments, y=targets: network.losses(p, a, y).sum())(
                network.parameters
            )
            total = {name: total[name] + summed[name] for name in total}
            count += len(targets)
    if not count:
        raise ValueError("data must hold at least one example, got none.")
    return total, count


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
    r"""The change of a quantity when one training example is left out, for each example.

    The first-order change of a quantity :math:`q(\theta)` is
    :math:`\frac1N \nabla q^\top (F + \delta I)^{-1} \nabla \ell_i`.  The quantity is the loss
    on test examples with :func:`loss_gradient`, or a prediction or parameter with its gradient.
    The cost is one solve, and one forward derivative of the losses for each batch.

    Args:
        model: the network at its fit.
        train: batches of the training set, in the order of the result.
        gradient: :math:`\nabla q`.
        fisher: the mean information of the training set; its ``num_examples`` is ``N``.
        likelihood: what the outputs mean.
        damping: :math:`\delta`, at least the weight decay of the mean loss.
        leverage: take the example out of the curvature too.  The result is then one step of
            Newton's method, for ``K + 1`` solves per example.  ``fisher`` must hold that
            curvature, as an exact matrix of the training set does.

    Returns:
        The changes ``[n]``, in the units of ``q``.  For a loss they are positive where the
        example helps, and negative where it harms.

    Raises:
        ValueError: the gradient is not over the parameters of ``fisher``, or the data are
            not batches.
        torch.linalg.LinAlgError: the damped matrix is singular, or with ``leverage`` holds less
            curvature than one example.
    """
    network = NetworkFunction(model, fisher.shapes, likelihood)
    if leverage:
        inverse = fisher.damped_inverse(damping)
        along = flatten({name: gradient[name].to(fisher.dtype) for name in fisher.shapes})
        chunks = example_vectors(network, train, fisher)
        changes = [chunk.moves(inverse, fisher) @ along for chunk in chunks]
        return torch.cat(changes) / fisher.num_examples
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
    r"""The rise of each training example's loss when that example is left out.

    It is :math:`\frac1N \nabla \ell_i^\top (F + \delta I)^{-1} \nabla \ell_i`, 0 or above.  It is
    large for examples that the rest of the training set does not explain, such as wrong labels.

    Args:
        model: the network at its fit.
        train: batches of the training set, in the order of the result.
        fisher: the mean information of the training set.
        likelihood: what the outputs mean.
        damping: :math:`\delta`.
        leverage: take the example out of the curvature too.  The result is then one step of
            Newton's method, for ``K + 1`` solves per example.  ``fisher`` must hold that
            curvature, as an exact matrix of the training set does.

    Returns:
        The rises ``[n]``, in nats.

    Raises:
        ValueError: the data are not batches.
        torch.linalg.LinAlgError: the damped matrix is singular, or with ``leverage`` holds less
            curvature than one example.
    """
    network = NetworkFunction(model, fisher.shapes, likelihood)
    rises = []
    if leverage:
        inverse = fisher.damped_inverse(damping)
        for chunk in example_vectors(network, train, fisher):
            rises.append((chunk.gradients * chunk.moves(inverse, fisher)).sum(1).double())
        return torch.cat(rises) / fisher.num_examples
    with network.evaluating():
        for arguments, targets in network.batches(train):
            for start in range(0, len(targets), CHUNK):
                rows = slice(start, start + CHUNK)
                gradients = network.gradients(arguments[rows], targets[rows])
                vectors = {name: g.to(fisher.dtype) for name, g in gradients.items()}
                rises.append(fisher.inverse_quadratic_forms(vectors, damping).double())
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
    r"""The parameters of a fit without some training examples, to first order.

    They are :math:`\theta + \frac1N (F + \delta I)^{-1} \sum_{i} \nabla \ell_i`.

    Args:
        model: the network at its fit.
        examples: batches of the examples that are left out.
        fisher: the mean information of the training set.
        likelihood: what the outputs mean.
        damping: :math:`\delta`.
        leverage: take the examples out of the curvature too.  The result is then one step of
            Newton's method, for ``K`` solves per example and one more.  ``fisher`` must hold
            that curvature, as an exact matrix of the training set does.

    Raises:
        ValueError: there are no examples.
        torch.linalg.LinAlgError: the damped matrix is singular, or with ``leverage`` holds less
            curvature than the examples.
    """
    batches = list(examples)
    parameters = dict(named_parameters(model))
    if leverage:
        network = NetworkFunction(model, fisher.shapes, likelihood)
        chunks = list(example_vectors(network, batches, fisher))
        if not chunks:
            raise ValueError("There are no examples to leave out.")
        # As one example: the sum of the losses, and all the vectors.
        gradient = torch.cat([chunk.gradients for chunk in chunks]).sum(0, keepdim=True)
        vectors = torch.cat([chunk.vectors.flatten(0, 1) for chunk in chunks])[None]
        (move,) = ExampleVectors(gradient, vectors).moves(fisher.damped_inverse(damping), fisher)
        moved = unflatten(move / fisher.num_examples, fisher.shapes)
        return {n: parameters[n].detach() + t.to(parameters[n]) for n, t in moved.items()}
    total, _ = _summed_gradient(model, batches, fisher, likelihood)
    right = {n: t.to(fisher.dtype) / fisher.num_examples for n, t in total.items()}
    moved = fisher.solve(right, damping)
    return {n: parameters[n].detach() + t.to(parameters[n]) for n, t in moved.items()}
