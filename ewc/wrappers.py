"""Modules that wrap a model and give its parameters other names.

``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put a module around a
model: ``0.weight`` becomes ``_orig_mod.0.weight`` or ``module.0.weight``.  This library uses
the names of the bare model throughout.  A wrapper is recognised by its class, so a submodule
called ``module`` keeps its name.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def bare(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; the module itself if it has none."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module  # type: ignore[no-any-return]
    # Importing it takes seconds; before it is imported nothing can be compiled.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        inner: nn.Module = module._orig_mod
        return inner
    return None


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """The pairs of ``model.named_parameters()``, with the names of the bare model.

    Args:
        model: the network; it and modules inside may be wrapped.
        remove_duplicate: whether a tied parameter has its first name only.
    """
    seen: set[int] = set()
    for name, parameter in _walked(model, ""):
        if not (remove_duplicate and id(parameter) in seen):
            seen.add(id(parameter))
            yield name, parameter


def _walked(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    module = bare(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _walked(child, f"{prefix}{name}.")


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter with this full name in the bare model, or ``None``."""
    module = bare(model)
    *path, leaf = name.split(".")
    for part in path:
        # A scripted module's children are no dict and have no get().
        child = module._modules[part] if part in module._modules else None  # noqa: SIM401
        if child is None:
            return None
        module = bare(child)
    return module._parameters[leaf] if leaf in module._parameters else None  # noqa: SIM401


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The bare model; inside the context its modules are bare too."""
    model = bare(model)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        _unwrap_children(model, replaced)
        yield model
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


def _unwrap_children(module: nn.Module, replaced: list[tuple[nn.Module, str, nn.Module]]) -> None:
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        inner = bare(child)
        if inner is not child:
            replaced.append((module, name, child))
            module._modules[name] = inner
        _unwrap_children(inner, replaced)
