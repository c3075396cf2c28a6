r"""Whether gradient descent on the penalty diverges: its stiffest direction and the step size.

With the penalty in the loss, a step of plain gradient descent multiplies the distance from the
anchor along an eigenvector of the penalty's matrix by :math:`1 - \eta l`, with the learning rate
:math:`\eta` and the eigenvalue :math:`l`.  It grows once :math:`\eta l > 2`.  In general the limit
:math:`c` of :math:`\eta l` is

========================================  ===================================
plain gradient descent                    :math:`2`
momentum :math:`\mu`                      :math:`2 (1 + \mu)`
Nesterov's momentum :math:`\mu`           :math:`2 (1 + \mu) / (1 + 2 \mu)`
========================================  ===================================

With dampening :math:`d` the step is :math:`\eta (1 - d)`, and weight decay :math:`w` adds to
:math:`l`.  With learning rates and weight decays by group, :math:`\eta l` is an eigenvalue of
:math:`H^{1/2} (P + W) H^{1/2}`, with the diagonal matrices of the rates and of the decays.

These are the conditions under which both roots of the iteration's characteristic polynomial lie in
the unit circle (Polyak 1964, doi:10.1016/0041-5553(64)90137-5, for momentum).

A parameter whose last gradient is 0 everywhere and that has no weight decay stays where it is, and
does not count.

Beyond the limit the penalty by itself diverges.  Below it, the loss may still diverge.  Adam and
its variants scale each step by the gradient's size, so no such limit holds for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc.consolidation.quadratic import Quadratic
from ewc.linalg.krylov import scaled_largest_eigenvalue
from ewc.parameters import Parameters


@dataclass(frozen=True)
class Stiffness:
    """The largest strength * Fisher * learning rate beside its limit.

    Attributes:
        product: the largest eigenvalue of the penalty's matrix times the learning rate, or
            less: for several quadratics that of the largest, if even their sum is below the limit.
        limit: the product above which gradient descent diverges.
        decay: the part of the product that weight decay can make, whatever the strength.
    """

    product: float
    limit: float
    decay: float = 0.0

    @property
    def ratio(self) -> float:
        """The product relative to the limit: above 1 gradient descent diverges."""
        return self.product / self.limit


def stiffness(
    terms: Sequence[Quadratic],
    scale: float,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
) -> Stiffness | None:
    """The stiffness of some quadratics for an optimizer.

    Args:
        terms: the quadratics.
        scale: their factor in the loss.
        parameters: the model's parameters by name.
        optimizer: the optimizer.

    Returns:
        The stiffness; ``None`` for an optimizer other than ``torch.optim.SGD``, or one whose
        groups with parameters of the quadratics differ in their limits.
    """
    if type(optimizer) is not torch.optim.SGD:
        return None
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {n: by_id[id(p)] for n, p in parameters.items() if id(p) in by_id}
    limits = {_limit(group) for group in groups.values()}
    if len(limits) != 1:
        return None
    limit = limits.pop()
    rates, decays = dict.fromkeys(parameters, 0.0), dict.fromkeys(parameters, 0.0)
    for name, group in groups.items():
        decays[name] = float(group["weight_decay"])
        rates[name] = _rate(group) * (decays[name] > 0 or _moves(parameters[name]))
    shifts = {rates[name] * decays[name] for name in parameters if rates[name]} or {0.0}
    most = max(shifts)
    each = [scale * term.precision.largest_eigenvalue(rates) for term in terms]
    if len(each) == 1 and len(shifts) == 1:
        return Stiffness(each[0] + most, limit, most)
    if sum(each) + most <= limit:
        return Stiffness(max(*each, most), limit, most)

    def product(v: Parameters) -> Parameters:
        images = [term.product(v) for term in terms]
        return {
            name: scale * sum((i[name] for i in images[1:]), images[0][name])
            + decays[name] * v[name]
            for name in v
        }

    place, dtype = terms[0].place
    like = {name: tensor.to(place, dtype) for name, tensor in terms[0].anchor.items()}
    return Stiffness(scaled_largest_eigenvalue(product, rates, like), limit, most)


def _moves(parameter: Tensor) -> bool:
    """Whether a parameter can leave its anchor: the head of another task has a gradient of 0."""
    return parameter.grad is None or bool(parameter.grad.any())


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate for a gradient that lasts, without momentum."""
    dampening = float(group["dampening"]) if group["momentum"] else 0.0
    return float(group["lr"]) * (1 - dampening)


def _limit(group: Mapping[str, Any]) -> float:
    momentum = float(group["momentum"])
    return 2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1)
