"""The oracle: Fisher information by brute force, from the definition.

Loops over examples and targets with plain autograd. Shares no code with the library.
"""

import math

import torch


def _gradient(scalar, parameters):
    grads = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g.to_dense()).reshape(-1)
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


def _log_categorical(output, label):
    return output[label] - torch.logsumexp(output, 0)


def _log_gaussian(output, target, variance):
    c = output.numel()
    return -((target - output) ** 2).sum() / (2 * variance) - c / 2 * math.log(
        2 * math.pi * variance
    )


def _outer(g):
    return torch.outer(g, g)


def categorical_fisher(model, examples, product=_outer):
    """Mean over examples of sum_k p_k grad log p_k (grad log p_k)', [p, p].

    With ``product=torch.square`` only its diagonal, [p].
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for arguments in examples:
        output = model(*(a[None] for a in arguments))[0]
        for label in range(output.numel()):
            log_prob = _log_categorical(output, label)
            g = _gradient(log_prob, parameters)
            total = total + log_prob.exp().detach() * product(g)
    return total / len(examples)


def gaussian_fisher(model, examples, variance):
    """Mean over examples of E_y[grad log p (grad log p)'] for y ~ N(f, variance).

    grad log p(f + e) is linear in e, so the expectation over e is a sum over the unit
    directions sigma e_k.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for arguments in examples:
        output = model(*(a[None] for a in arguments))[0]
        for k in range(output.numel()):
            target = output.detach().clone()
            target[k] += math.sqrt(variance)
            g = _gradient(_log_gaussian(output, target, variance), parameters)
            total = total + _outer(g)
    return total / len(examples)


def empirical_fisher(model, examples, targets, variance=None):
    """Mean over examples of grad log p(y_n) (grad log p(y_n))', [p, p]."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for arguments, target in zip(examples, targets, strict=True):
        output = model(*(a[None] for a in arguments))[0]
        if variance is None:
            log_prob = _log_categorical(output, int(target))
        else:
            log_prob = _log_gaussian(output, target, variance)
        g = _gradient(log_prob, parameters)
        total = total + _outer(g)
    return total / len(examples)
