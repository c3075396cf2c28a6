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


def fisher_by_moments(model, examples, log_prob, supports):
    """Mean over examples of E_y[grad log p grad log p'] for independent outputs, [p, p].

    For log-densities whose gradient is affine in every target (Bernoulli, Poisson): the
    expectation over the outputs' own distributions, each summed over its ``support``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for arguments in examples:
        output = model(*(a[None] for a in arguments))[0]
        c = output.numel()
        zero = torch.zeros_like(output)
        base = _gradient(log_prob(output, zero).sum(), parameters)
        values = torch.tensor(supports, dtype=output.dtype)
        probabilities = log_prob(output, values[:, None]).exp().detach()  # [supports, outputs]
        slopes, means, variances = [], [], []
        for k in range(c):
            unit = zero.clone()
            unit[k] = 1
            slopes.append(_gradient(log_prob(output, unit).sum(), parameters) - base)
            weights = probabilities[:, k]
            mean = (weights * values).sum()
            means.append(mean)
            variances.append((weights * (values - mean) ** 2).sum())
        centre = base + sum(m * s for m, s in zip(means, slopes, strict=True))
        total = total + _outer(centre)
        total = total + sum(v * _outer(s) for v, s in zip(variances, slopes, strict=True))
    return total / len(examples)


def log_bernoulli(output, target):
    """Entry by entry, from the two probabilities."""
    p = 1 / (1 + torch.exp(-output))
    return target * torch.log(p) + (1 - target) * torch.log(1 - p)


def log_poisson(output, target):
    """Entry by entry; target! by the gamma function."""
    return target * output - torch.exp(output) - torch.lgamma(target + 1)


def kronecker_factors(model, module, examples, positions, reduce=False):
    """K-FAC's factors of one module for a categorical output, by loops, and the examples' mean.

    ``positions`` turns the module's input and output (or gradient) of one example into
    rows [t, i] and [t, o].
    """
    kept = {}

    def hook(_module, args, output):
        kept["input"], kept["output"] = args[0].detach(), output

    handle = module.register_forward_hook(hook)
    a_sum, g_sum = 0, 0
    for arguments in examples:
        output = model(*(a[None] for a in arguments))[0]
        for label in range(output.numel()):
            log_prob = _log_categorical(output, label)
            (gradient,) = torch.autograd.grad(log_prob, kept["output"], retain_graph=True)
            a, g = positions(kept["input"][0], gradient[0])
            if reduce:
                a, g = a.mean(0, keepdim=True), g.sum(0, keepdim=True)
            g_sum = g_sum + log_prob.exp().detach() * sum(_outer(row) for row in g)
        ones = torch.ones(len(a), 1, dtype=a.dtype)
        a = torch.cat([a, ones], 1) if module_bias(module) else a
        a_sum = a_sum + sum(_outer(row) for row in a) / len(a)
    handle.remove()
    return a_sum / len(examples), g_sum / len(examples)


def module_bias(module):
    return getattr(module, "bias", None) is not None


def empirical_by(model, examples, targets, log_prob):
    """Mean over examples of grad log p(y_n) (grad log p(y_n))' for a log-density by entries."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for arguments, target in zip(examples, targets, strict=True):
        output = model(*(a[None] for a in arguments))[0]
        total = total + _outer(_gradient(log_prob(output, target).sum(), parameters))
    return total / len(examples)
