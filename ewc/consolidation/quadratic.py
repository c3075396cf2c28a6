r"""Quadratics around anchors, and the differentiable value of their sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ewc.checks import check_count, check_has_numbers, check_not_negative
from ewc.linalg.devices import sizes_for
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import (
    Parameters,
    Shapes,
    accumulation_dtype,
    check_same_shapes,
    check_shape,
    difference,
    padded,
    shapes_of,
)
from ewc.wrappers import ParameterNames


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

    @cached_property
    def names(self) -> ParameterNames:
        """The names of the parameters, to find them in a model."""
        return ParameterNames(self.anchor)

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the parameters, in the order of the anchor."""
        return shapes_of(self.anchor)

    @cached_property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """The device and the type of the precision."""
        return self.precision.device, self.precision.dtype

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Quadratic":
        """The function with ``function`` (a move, a cast) applied to its tensors.

        The anchor changes its device but keeps its type, as rounding would move it.  The precision
        stays in single precision or wider, as half precision cannot hold ``N F``.
        """

        def wide(tensor: Tensor) -> Tensor:
            changed = function(tensor)
            if not tensor.is_floating_point():
                return changed
            return tensor.to(changed.device, accumulation_dtype(changed.dtype))

        anchor = {name: t.to(function(t).device) for name, t in self.anchor.items()}
        return Quadratic(self.precision.mapped(wide), anchor, self.constant)

    def beside(self, parameters: Parameters) -> "Quadratic":
        """The function on the device of the parameters, the precision in the type for them.

        Raises:
            ValueError: the parameters are complex, or one of the two is on the device ``meta``.
        """
        first = next(iter(parameters.values()))
        check_has_numbers(first, "The model")
        place = first.device, type_for(parameters)
        if place == self.place:
            return self
        check_has_numbers(next(iter(self.anchor.values())), "The penalty")
        anchor = {name: tensor.to(place[0]) for name, tensor in self.anchor.items()}
        return replace(self, precision=self.precision.to(*place), anchor=anchor)

    def step_to(self, here: Parameters) -> Parameters:
        """The difference of some parameters from the anchor, in the type of the precision."""
        return difference(here, self.anchor, self.place[1])

    def product(self, v: Parameters) -> Parameters:
        """The product of the precision with a vector."""
        return self.precision.matvec(v)

    def form_and_product(self, here: Parameters) -> tuple[Tensor, Parameters]:
        r"""The numbers :math:`d^\top P d` and :math:`P d` at :math:`d = \theta - a`."""
        return self.precision.form_and_product(here, self.anchor)

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
        """The quadratic whose :meth:`state` this is.

        Raises:
            ValueError: the anchor is not over the parameters of the matrix, or is not finite; or
                the matrix has impossible entries (:meth:`FisherMatrix.check_entries`).
            FloatingPointError: an entry of the matrix is not finite.
        """
        for name, tensor in state["precision"].items():
            check_has_numbers(tensor, f"The tensor {name!r}")
        precision = FisherMatrix.from_description(state["precision"], state["about"])
        check_count(precision.num_examples, "num_examples")
        precision.check_entries()
        anchor = dict(state["anchor"])
        check_same_shapes(shapes_of(anchor), precision.shapes, "The anchor")
        for name, tensor in anchor.items():
            check_shape(tensor, precision.shapes[name], f"The anchor of {name!r}")
            check_has_numbers(tensor, f"The anchor of {name!r}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"The anchor of {name!r} must be finite.")
        check_not_negative(state["constant"], "constant")
        return cls(precision, anchor, state["constant"])


def type_for(parameters: Parameters) -> torch.dtype:
    """The widest of the parameters' types, single precision at least.

    Raises:
        ValueError: a parameter is complex.
    """
    dtype = torch.float32
    for kind in {parameter.dtype for parameter in parameters.values()}:
        dtype = torch.promote_types(dtype, kind)
    if dtype.is_complex:
        raise ValueError(f"The parameters of a penalty must be real, got {dtype}.")
    return dtype


class QuadraticForm(torch.autograd.Function):
    """The sum of quadratics, with its gradient in closed form.

    Value and gradient are computed together in one sweep over the parameters.  Autograd would keep
    three tensors per parameter and sweep twice.
    """

    @staticmethod
    def forward(ctx: Any, terms: list[Quadratic], names: list[str], *parameters: Tensor) -> Tensor:
        """The value; its gradient is kept for :meth:`backward`."""
        ctx.terms, ctx.names = terms, names
        ctx.save_for_backward(*parameters)
        here = dict(zip(names, parameters, strict=True))
        value, ctx.gradient = value_and_gradient(terms, here)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient times the outer gradient."""
        (factor,) = outer
        if torch.is_grad_enabled() or ctx.gradient is None:
            # For a second derivative, or a second backward pass of the same value.
            here = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            gradient = [factor * tensor for tensor in gradient_at(ctx.terms, here)]
        else:
            gradient, ctx.gradient = ctx.gradient, None
            # The factor is 1 where a loss just adds the penalty.  On a host reading it is cheaper
            # than a sweep over the parameters; on an accelerator it is the other way round.
            if sizes_for(factor.device).waits or factor.item() != 1.0:
                torch._foreach_mul_(gradient, factor)
        cast = (g.to(p.dtype) for g, p in zip(gradient, ctx.saved_tensors, strict=True))
        return (None, None, *cast)


def gradient_kept_by(value: Tensor, names: list[str]) -> Parameters:
    """The gradient that a :class:`QuadraticForm` keeps for its backward pass, by parameter."""
    form: Any = value.grad_fn
    return dict(zip(names, form.gradient, strict=True))


def value_and_gradient(terms: list[Quadratic], here: Parameters) -> tuple[Tensor, list[Tensor]]:
    """The sum of the quadratics at ``here``, and its gradient in the order of ``here``."""
    value: Tensor | float = 0.0
    gradient: list[Tensor] = []
    with _full_precision(terms):
        for term in terms:
            form, product = term.form_and_product(here)
            value = value + 0.5 * form + term.constant
            gradient = _plus(gradient, [product[name] for name in here])
    assert isinstance(value, Tensor)
    return value, gradient


def gradient_at(terms: list[Quadratic], here: Parameters) -> list[Tensor]:
    """The gradient by itself, by operations that autograd follows."""
    gradient: list[Tensor] = []
    with _full_precision(terms):
        for term in terms:
            product = term.product(term.step_to(here))
            gradient = _plus(gradient, [product[name] for name in here])
    return gradient


def _full_precision(terms: list[Quadratic]) -> torch.autocast:
    """Autocast would take products in half precision, which cannot hold ``N F``."""
    return torch.autocast(terms[0].place[0].type, enabled=False)


def _plus(total: list[Tensor], summands: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(total, summands)) if total else summands
