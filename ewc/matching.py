"""Quadratics over a model's parameters, matched by name: models grow between tasks.

A parameter that came later than a quadratic, and rows that one gained since (a classifier
that met new classes), are free in it.
"""

from collections.abc import Sequence

from torch import nn

from ewc.consolidation import Consolidation
from ewc.fisher.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, grown_shapes, parameter_of, shapes_of
from ewc.quadratic import Quadratic


def joined(
    terms: Sequence[Quadratic],
    precision: FisherMatrix,
    model: nn.Module,
    consolidation: Consolidation,
) -> list[Quadratic]:
    """The quadratics after a task, over the old parameters and the new ones.

    Args:
        terms: the quadratics so far.
        precision: of the task, over parameters of the model.
        model: which has just learnt the task: its parameters are the task's anchor.
        consolidation: how quadratics over the same parameters are put together.

    Raises:
        ValueError: the names or shapes of ``precision`` do not fit the model.
        FloatingPointError: an entry of its diagonal is not finite.
    """
    parameters = dict(model.named_parameters())
    present = {name: parameters[name] for name in precision.shapes if name in parameters}
    check_same_shapes(shapes_of(present), precision.shapes, type(model).__name__)
    for name, entries in precision.diagonal().items():
        if not bool(entries.isfinite().all()):
            raise FloatingPointError(
                f"The Fisher information of parameter {name!r} is not finite: it cannot "
                "be consolidated."
            )
    union = dict(precision.shapes)
    for term in terms:
        # A parameter that is frozen by now is not in the new matrix, but still in the
        # model, maybe grown; one that is gone keeps its old shape.
        shapes = term.precision.shapes
        still = {n: parameters[n].shape for n in shapes if n in parameters}
        union = grown_shapes(shapes, still) | union
    if union != precision.shapes:
        precision = precision.embedded(union)
    values = {n: t for term in terms for n, t in term.anchor.items()} | parameters
    anchor = {n: values[n].detach().to(precision.dtype, copy=True) for n in union}
    old = [term.beside(anchor) for term in terms]
    old = [term if term.precision.shapes == union else term.embedded(union) for term in old]
    return consolidation.consolidated(old, Quadratic(precision, anchor))


def fitted(terms: Sequence[Quadratic], model: nn.Module) -> tuple[list[Quadratic], Parameters]:
    """The quadratics in the shapes, type and place of a model, and its parameters in them.

    Args:
        terms: one or more, over the same parameters.
        model: which may have grown since.

    Raises:
        ValueError: a parameter of theirs is gone from the model, or its shape changed in
            another way than by new rows.
    """
    now: Parameters = {}
    fits = True
    for name, tensor in terms[-1].anchor.items():
        # Every step comes by here: named_parameters() would walk the whole network.
        parameter = parameter_of(model, name)
        if parameter is None:
            raise ValueError(
                f"{type(model).__name__} has no parameter {name!r}, which the penalty "
                "remembers: a model may gain parameters between tasks, not lose them."
            )
        fits = fits and parameter.shape == tensor.shape
        now[name] = parameter
    if not fits:
        terms = [
            term.embedded(grown_shapes(shapes_of(term.anchor), shapes_of(now))) for term in terms
        ]
    return [term.beside(now) for term in terms], now
