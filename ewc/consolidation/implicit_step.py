r"""The implicit step of a quadratic penalty, stable for any strength.

With the penalty in the loss every step costs a product with the Fisher matrix, and gradient
descent diverges once strength x Fisher x learning rate exceeds 2.  The implicit step leaves
the penalty out of the loss.  After ``m`` steps of the optimizer the parameters
:math:`\theta'` move to

.. math:: \arg\min_\theta\ \tfrac12 (\theta - \theta')^\top H^{-1} (\theta - \theta')
          + \tfrac m2 (\theta - a)^\top P (\theta - a)
          = a + (I + m H P)^{-1} (\theta' - a)

with :math:`H` the step sizes of the optimizer.  This is a backward Euler step of the penalty's
gradient flow, a proximal gradient method (Parikh & Boyd 2014, section 4.2).  It shrinks the
distance to the anchor in every direction and overshoots in none.  It has the fixed point of the
explicit step, :math:`\nabla L = -P (\theta - a)`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ewc.consolidation.quadratic import Quadratic

SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
"""The optimizer state that holds the mean squared gradient: Adam and its variants, RMSprop."""


def step_sizes(optimizer: Optimizer) -> dict[int, Tensor | float]:
    r"""How far a gradient of 1 moves each parameter in a step, by the parameter's ``id``.

    For plain gradient descent this is the learning rate :math:`\eta`, divided by :math:`1 - \mu`
    with momentum :math:`\mu`.  For Adam, its variants and RMSprop it is
    :math:`\eta / (\sqrt{\hat v} + \epsilon)` per entry, with the bias-corrected mean squared
    gradient :math:`\hat v`.
    """
    sizes: dict[int, Tensor | float] = {}
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        if group.get("momentum"):
            rate *= (1 - group.get("dampening", 0.0)) / (1 - group["momentum"])
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            moment = next((state[key] for key in SECOND_MOMENTS if key in state), None)
            if moment is None:
                sizes[id(parameter)] = rate
                continue
            if "betas" in group:
                moment = moment / (1 - group["betas"][1] ** float(state["step"]))
            sizes[id(parameter)] = rate / (moment.sqrt() + group.get("eps", 0.0))
    return sizes


@torch.no_grad()
def implicit_step(
    terms: Sequence[Quadratic],
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    num_steps: int = 1,
) -> None:
    r"""Move the parameters by the implicit step of each quadratic in turn.

    Which step sizes a matrix uses is described in :meth:`ewc.FisherMatrix.resolvent`.

    Args:
        terms: the quadratics, in the units of the loss.
        parameters: the model's parameters by name, changed in place.
        optimizer: the optimizer that has taken the steps.
        num_steps: ``m``, the steps since the last implicit step.
    """
    sizes = step_sizes(optimizer)
    for term in terms:
        names = [name for name in term.precision.shapes if id(parameters[name]) in sizes]
        here = {name: parameters[name] for name in term.precision.shapes}
        away = term.step_to(here)
        steps = {name: num_steps * sizes[id(here[name])] for name in names}
        moved = term.precision.resolvent(away, steps)
        for name in names:
            here[name].copy_(term.anchor[name] + moved[name])
