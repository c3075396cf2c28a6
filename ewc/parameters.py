r"""Vectors over a network's parameters: one tensor for each name, in the model's order.

A gradient, an anchor, a diagonal and a direction :math:`v` are all ``Parameters``: a plain
``dict`` from the names of ``model.named_parameters()`` to tensors of the same shapes.  The
order of the dict is the order of the flat vector.  Names are those of the bare model, without
its wrappers (:mod:`ewc.wrappers`).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor, nn

from ewc.checks import check_count, check_has_numbers, check_instance, shown
from ewc.wrappers import named_parameters

Parameters = dict[str, Tensor]
"""Tensors by parameter name; the order of the keys is the flat order."""

Shapes = dict[str, torch.Size]
"""Parameter shapes by name, in the flat order."""


def trainable_parameters(model: nn.Module) -> Parameters:
    """The parameters of ``model`` that require a gradient, by name, in the model's order.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    parameters: Parameters = {
        name: parameter for name, parameter in named_parameters(model) if parameter.requires_grad
    }
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: at least one of its "
            "parameters must have requires_grad=True."
        )
    return parameters


Selection = str | nn.Module | nn.Parameter
"""A choice of parameters: a name, a pattern such as ``"head.*"``, a module, a parameter."""


def selected_parameters(model: nn.Module, selection: Sequence[Selection] | None) -> Parameters:
    """The trainable parameters that a selection names, in the model's order.

    Args:
        model: the network.
        selection: names, patterns, modules or parameters; ``None`` for all.

    Raises:
        ValueError: there is no trainable parameter, the selection is empty, an item
            selects nothing, or a chosen parameter is complex or on the device ``meta``.
        TypeError: an item is of another type.
    """
    parameters = trainable_parameters(model)
    if selection is None:
        return _usable(parameters)
    if isinstance(selection, str | nn.Module | nn.Parameter):
        selection = [selection]
    if not selection:
        raise ValueError(
            "parameters must name at least one parameter, or be None for all, got an empty list."
        )
    chosen: set[str] = set()
    for item in selection:
        if isinstance(item, str):
            every = named_parameters(model, remove_duplicate=False)
            places = {id(p) for name, p in every if name == item or fnmatchcase(name, item)}
        elif isinstance(item, nn.Module | nn.Parameter):
            inside = [item] if isinstance(item, nn.Parameter) else item.parameters()
            places = {id(parameter) for parameter in inside}
        else:
            raise TypeError(
                f"parameters must hold names, patterns, modules or parameters, got {shown(item)}."
            )
        names = {name for name, parameter in parameters.items() if id(parameter) in places}
        if not names:
            selector = repr(item) if isinstance(item, str) else f"The {type(item).__name__}"
            raise ValueError(
                f"{selector} selects none of the model's trainable parameters "
                f"({', '.join(parameters)})."
            )
        chosen |= names
    return _usable({name: value for name, value in parameters.items() if name in chosen})


def _usable(parameters: Parameters) -> Parameters:
    """The same parameters, if all are real numbers.

    Raises:
        ValueError: a parameter is complex, or on the device ``meta``.
    """
    for name, parameter in parameters.items():
        check_has_numbers(parameter, f"Parameter {name!r}")
        if parameter.is_complex():
            raise ValueError(
                f"Parameter {name!r} must be real, got {parameter.dtype}: keep its real and "
                "imaginary parts in a parameter [..., 2] for torch.view_as_complex, or leave it "
                "out by parameters=."
            )
    return parameters


def shapes_of(parameters: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor, by name, in the same order."""
    return {name: tensor.shape for name, tensor in parameters.items()}


@cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over many terms: at least single precision.

    A sum in half precision stops growing at some hundred times its terms.
    """
    return torch.promote_types(dtype, torch.float32)


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one vector of shape ``[p]``, in the order of the dict."""
    return torch.cat([tensor.reshape(-1) for tensor in parameters.values()])


def unflatten(vector: Tensor, shapes: Mapping[str, torch.Size]) -> Parameters:
    """The inverse of :func:`flatten`: views into ``vector`` (shape ``[p]``) by name."""
    pieces = torch.split(vector, [shape.numel() for shape in shapes.values()])
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    r"""The inner product :math:`\sum_p u_p v_p` of two ``Parameters``, a scalar tensor."""
    products = [torch.dot(u.reshape(-1), right[name].reshape(-1)) for name, u in left.items()]
    return torch.stack(products).sum()


def difference(here: Parameters, anchor: Parameters, dtype: torch.dtype) -> Parameters:
    """The difference of some parameters from an anchor, in a type for all.

    It is taken in the wider type of the two, so that no difference is lost.
    """
    points, anchors = list(here.values()), [anchor[name] for name in here]
    if all(p.dtype == a.dtype for p, a in zip(points, anchors, strict=True)):
        steps = list(torch._foreach_sub(points, anchors))
    elif torch.is_grad_enabled():
        # Copies of lists have no derivative.
        steps = [p.to(_wider(p, a)) - a for p, a in zip(points, anchors, strict=True)]
    else:
        # On accelerators only copies take lists of mixed types in one launch.
        steps = [
            torch.empty_like(a, dtype=_wider(p, a)) for p, a in zip(points, anchors, strict=True)
        ]
        torch._foreach_copy_(steps, points)
        torch._foreach_sub_(steps, anchors)
    return {name: step.to(dtype) for name, step in zip(here, steps, strict=True)}


def _wider(left: Tensor, right: Tensor) -> torch.dtype:
    return torch.promote_types(left.dtype, right.dtype)


def check_same_shapes(
    shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], what: str
) -> None:
    """Check that ``shapes`` are exactly the names and shapes of ``expected``.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; ``what`` names the tensors
            in the message.
    """
    if odd := expected.keys() ^ shapes.keys():
        name = min(odd)
        state = "lacks" if name in expected else "has the unknown"
        raise ValueError(
            f"{what} {state} parameter {name!r}: its names must be those of the Fisher "
            f"matrix ({', '.join(expected)})."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{what} has shape {list(shapes[name])} for parameter {name!r}: "
                f"the Fisher matrix has {list(shape)}."
            )


def size_of(sizes: Sequence[int]) -> torch.Size:
    """A shape from its sizes, as a file holds them.

    Raises:
        ValueError: a size is not a whole number, 0 or more.
        TypeError: the sizes are not a list.
    """
    check_instance(sizes, list | tuple, "A shape", "a list")
    for size in sizes:
        check_count(size, "A size", least=0)
    return torch.Size(sizes)


def check_shape(tensor: Tensor, shape: Sequence[int], what: str) -> None:
    """Check that a tensor is dense, and has a shape and a floating-point type.

    Raises:
        ValueError: the tensor has another shape, type or layout; ``what`` names it in the message.
    """
    fits = list(tensor.shape) == list(shape) and tensor.layout == torch.strided
    if not (fits and tensor.is_floating_point()):
        layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
        raise ValueError(
            f"{what} must have shape {list(shape)} and a floating-point type, got shape "
            f"{list(tensor.shape)} and type {tensor.dtype}{layout}."
        )


def grown_shapes(old: Mapping[str, torch.Size], new: Mapping[str, torch.Size]) -> Shapes:
    """The union of two sets of shapes, where a parameter may only have gained rows.

    A parameter in both sets keeps its new shape.  A classifier that met new classes has rows
    added at the end; everything else must be equal.

    Raises:
        ValueError: a parameter shrank, or changed in another dimension than the rows.
    """
    union = dict(old) | dict(new)
    for name, was in old.items():
        now = union[name]
        same_row = len(was) == len(now) and was[1:] == now[1:]
        if was != now and not (len(was) > 0 and same_row and now[0] >= was[0]):
            raise ValueError(
                f"Parameter {name!r} has shape {list(now)} in the model and "
                f"{list(was)} in the Fisher matrix: only rows added at the end fit."
            )
    return union


def padded(parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Parameters:
    """The tensors at these shapes: zero in new last rows, and all zero for new names."""
    like = next(iter(parameters.values()))
    result: Parameters = {}
    for name, shape in shapes.items():
        old = parameters.get(name)
        if old is None or old.shape != shape:
            result[name] = (like if old is None else old).new_zeros(shape)
            if old is not None:
                result[name][: old.shape[0]] = old
        else:
            result[name] = old
    return result
