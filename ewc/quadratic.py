r"""Quadratics around anchors, and their sum as a differentiable value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc.fisher.matrix import FisherMatrix
from ewc.parameters import Parameters, Shapes, accumulation_dtype, dot, padded


@dataclass(frozen=True, eq=False)
class Quadratic:
    r"""The function :math:`\frac12 (\theta - a)^\top P (\theta - a) + c`.

    Attributes:
        precision: :math:`P`, a Fisher matrix times its number of examples.
        anchor: :math:`a`.
        constant: :math:`c`, in nats.
    """

    precision: FisherMatrix
    anchor: Parameters
    constant: float = 0.0

    def embedded(self, shapes: Shapes) -> "Quadratic":
        """The same function over more parameters, flat in the new ones."""
        anchor = padded(self.anchor, shapes)
        return Quadratic(self.precision.embedded(shapes), anchor, self.constant)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Quadratic":
        """The function with ``function`` applied to every tensor (a move, a cast)."""
        anchor = {name: function(tensor) for name, tensor in self.anchor.items()}
        return Quadratic(self.precision.mapped(function), anchor, self.constant)

    def beside(self, parameters: Parameters) -> "Quadratic":
        """The function where the parameters are, in their type or in single precision."""
        name, anchor = next(iter(self.anchor.items()))
        here = parameters.get(name, next(iter(parameters.values())))
        # Half precision cannot hold N F: sums over a data set overflow it.
        dtype = accumulation_dtype(here.dtype)
        if (here.device, dtype) == (anchor.device, anchor.dtype):
            return self
        return self.mapped(lambda tensor: tensor.to(here.device, dtype))

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for a ``state_dict``."""
        tensors, about = self.precision.description()
        return {
            "precision": tensors,
            "about": about,
            "anchor": self.anchor,
            "constant": self.constant,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Quadratic":
        """The quadratic of what :meth:`state` returned."""
        precision = FisherMatrix.from_description(state["precision"], state["about"])
        return cls(precision, dict(state["anchor"]), state["constant"])


class QuadraticForm(torch.autograd.Function):
    """The sum of quadratics, with its gradient written down instead of traced.

    The gradient is made along with the value, in one sweep over the parameters; autograd
    would keep three tensors a parameter and sweep twice.
    """

    @staticmethod
    def forward(ctx: Any, terms: list[Quadratic], names: list[str], *parameters: Tensor) -> Tensor:
        """The value, its gradient kept for later."""
        ctx.terms, ctx.names = terms, names
        ctx.save_for_backward(*parameters)
        here = dict(zip(names, parameters, strict=True))
        value, ctx.gradient = value_and_gradient(terms, here)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient times that of what the value is a part of."""
        (factor,) = outer
        if torch.is_grad_enabled() or ctx.gradient is None:
            # A second derivative is wanted, or a second backward pass of the same value.
            here = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            _, gradient = value_and_gradient(ctx.terms, here)
            gradient = [factor * tensor for tensor in gradient]
        else:
            gradient, ctx.gradient = ctx.gradient, None
            # Most losses just add the penalty. Reading the factor costs nothing on a CPU,
            # where a sweep over the parameters does; on a device it is the other way round.
            if factor.device.type != "cpu" or factor.item() != 1.0:
                torch._foreach_mul_(gradient, factor)
        cast = (g.to(p.dtype) for g, p in zip(gradient, ctx.saved_tensors, strict=True))
        return (None, None, *cast)


def value_and_gradient(terms: list[Quadratic], here: Parameters) -> tuple[Tensor, list[Tensor]]:
    """The sum of the quadratics at ``here``, and its gradient in the order of ``here``."""
    value: Tensor | float = 0.0
    gradient: Parameters = {}
    for term in terms:
        differences = torch._foreach_sub(list(here.values()), [term.anchor[n] for n in here])
        step = dict(zip(here, differences, strict=True))
        # Under autocast products would come in half precision, which cannot hold N F.
        with torch.autocast(differences[0].device.type, enabled=False):
            product = term.precision.matvec(step)
        value = value + 0.5 * dot(step, product) + term.constant
        if gradient:
            product = {name: gradient[name] + tensor for name, tensor in product.items()}
        gradient = product
    assert isinstance(value, Tensor)
    return value, [gradient[name] for name in here]
