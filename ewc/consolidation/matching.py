"""Quadratics over a model's parameters, matched by name: models may grow between tasks.

A quadratic does not constrain parameters that are newer than it, nor new rows of a parameter (a
classifier that met new classes).
"""

from collections.abc import Sequence

from torch import nn

from ewc.checks import check_has_numbers
from ewc.consolidation.combination import Consolidation
from ewc.consolidation.quadratic import Quadratic, type_for
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import (
    Parameters,
    accumulation_dtype,
    check_same_shapes,
    grown_shapes,
    shapes_of,
)
from ewc.wrappers import bare, named_parameters


def precision_of(fisher: FisherMatrix, model: nn.Module) -> FisherMatrix:
    """A task's precision on the device of the model's parameters, in the type for them.

    Args:
        fisher: a matrix over parameters of the model.
        model: the network.

    Raises:
        ValueError: the names or shapes do not fit the model, a parameter is complex or on the
            device ``meta``, or the matrix has another type or impossible entries
            (:meth:`FisherMatrix.check_entries`).
        FloatingPointError: an entry is not finite, or overflows times the number of examples.
    """
    parameters = dict(named_parameters(model))
    present: Parameters = {n: parameters[n] for n in fisher.shapes if n in parameters}
    check_same_shapes(shapes_of(present), fisher.shapes, type(bare(model)).__name__)
    for name, parameter in present.items():
        check_has_numbers(parameter, f"Parameter {name!r}")
    if not present:
        raise ValueError(
            "The Fisher matrix must be over parameters of the model, got none of them."
        )
    if not fisher.dtype.is_floating_point or fisher.device.type == "meta":
        raise ValueError(
            "The Fisher matrix must have floating-point numbers, got a matrix of type "
            f"{fisher.dtype} on the device {fisher.device}."
        )
    place = next(iter(present.values())).device, type_for(present)
    if (fisher.device, fisher.dtype) != place:
        fisher = fisher.to(*place)
    precision = fisher.precision
    precision.check_entries()
    return precision


def with_task(
    terms: Sequence[Quadratic],
    precision: FisherMatrix,
    model: nn.Module,
    consolidation: Consolidation,
) -> list[Quadratic]:
    """The quadratics after a task, over the old parameters and the new ones.

    Args:
        terms: the quadratics so far.
        precision: the precision of the task, from :func:`precision_of`.
        model: the model after the task; its parameters are the task's anchor.
        consolidation: how quadratics over the same parameters are combined.
    """
    parameters: Parameters = dict(named_parameters(model))
    union = dict(precision.shapes)
    for term in terms:
        # A frozen parameter is not in the new matrix, but still in the model, and it may have
        # grown.  A parameter that is gone keeps its old shape.
        shapes = term.precision.shapes
        present = {n: parameters[n].shape for n in shapes if n in parameters}
        union = grown_shapes(shapes, present) | union
    if union != precision.shapes:
        precision = precision.embedded(union)
    values = {n: t for term in terms for n, t in term.anchor.items()} | parameters
    # In the parameters' type, not the matrix's: rounding would move the anchor.  Single
    # precision holds half precision exactly, and differences from it too.
    anchor = {
        n: values[n].detach().to(dtype=accumulation_dtype(values[n].dtype), copy=True)
        for n in union
    }
    new = Quadratic(precision, anchor).beside(anchor)
    old = [term.beside(anchor) for term in terms]
    old = [term if term.precision.shapes == union else term.embedded(union) for term in old]
    return consolidation.consolidated(old, new)


def fitted(terms: Sequence[Quadratic], model: nn.Module) -> tuple[list[Quadratic], Parameters]:
    """The quadratics in the shapes, type and device of a model, and the model's parameters in them.

    Args:
        terms: one or more quadratics over the same parameters.
        model: the model, which may have grown.

    Raises:
        ValueError: a parameter of the quadratics is gone from the model, is complex or on the
            device ``meta``, or its shape changed in another way than by new rows.
    """
    now: Parameters = {}
    for name, parameter in terms[-1].names.parameters_of(model).items():
        if parameter is None:
            raise ValueError(
                f"{type(bare(model)).__name__} has no parameter {name!r}, which is in the "
                "penalty: a model may gain parameters between tasks, not lose them."
            )
        now[name] = parameter
    # A parameter that is cast or resized in place is still the same object.
    shapes = shapes_of(now)
    if shapes != terms[-1].shapes:
        terms = [term.embedded(grown_shapes(term.shapes, shapes)) for term in terms]
    return [term.beside(now) for term in terms], now
