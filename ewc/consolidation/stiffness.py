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
:math:`l`.  These are the conditions under which both roots of the iteration's characteristic
polynomial lie in the unit circle (Polyak 1964, doi:10.1016/0041-5553(64)90137-5, for momentum).

A parameter whose last gradient is 0 everywhere stays where it is, and does not count.

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
    """

    product: float
    limit: float

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
        groups differ in momentum or in weight decay.
    """
    if type(optimizer) is not torch.optim.SGD:
        return None
    groups = optimizer.param_groups
    limits = {_limit(group) for group in groups}
    decays = {_rate(group) * float(group["weight_decay"]) for group in groups}
    if len(limits) != 1 or len(decays) != 1:
        return None
    limit = limits.pop() - decays.pop()
    if limit <= 0:
        return None
    by_id = {id(p): _rate(group) for group in groups for p in group["params"]}
    rates = {n: by_id.get(id(p), 0.0) * _moves(p) for n, p in parameters.items()}
    each = [scale * term.precision.largest_eigenvalue(rates) for term in terms]
    if len(each) == 1 or sum(each) <= limit:
        return Stiffness(max(each), limit)

    def product(v: Parameters) -> Parameters:
        images = [term.product(v) for term in terms]
        return {name: sum((i[name] for i in images[1:]), images[0][name]) for name in v}

    place, dtype = terms[0].place
    like = {name: tensor.to(place, dtype) for name, tensor in terms[0].anchor.items()}
    return Stiffness(scale * scaled_largest_eigenvalue(product, rates, like), limit)


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
