"""Modules that wrap a model and give its parameters other names.

``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put a module around a
model: ``0.weight`` becomes ``_orig_mod.0.weight`` or ``module.0.weight``.  This library uses
the names of the bare model throughout.  A wrapper is recognised by its class, so a submodule
called ``module`` keeps its name.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from torch import nn


def bare(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; the module itself if it has none."""
    # mypy takes a class for unhashable.
    while (name := _inner_name(type(module))) is not None:  # type: ignore[arg-type]
        module = getattr(module, name)
    return module


@lru_cache(maxsize=1024)
def _inner_name(kind: type[nn.Module]) -> str | None:
    """The attribute of a class of wrappers that holds the module inside."""
    if issubclass(kind, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    # Importing it takes seconds; before it is imported no class can be derived from it.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and issubclass(kind, compiler.OptimizedModule):
        return "_orig_mod"
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


class ParameterNames:
    """Full names of parameters as a tree, to look all of them up in one walk.

    Nothing of a model is kept, so a parameter or module that was replaced is found at once.

    Args:
        names: names in the bare model.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._root = _Branch()
        for name in self.names:
            *path, leaf = name.split(".")
            branch = self._root
            for part in path:
                branch = branch.children.setdefault(part, _Branch())
            branch.leaves.append((leaf, name))

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter | None]:
        """The parameters of a model with these names, in their order; ``None`` without one."""
        found: dict[str, nn.Parameter | None] = dict.fromkeys(self.names)
        _look_up(self._root, model, found)
        return found


class _Branch:
    """The names below one module: those of its own parameters, and its children's."""

    def __init__(self) -> None:
        self.leaves: list[tuple[str, str]] = []
        self.children: dict[str, _Branch] = {}


def _look_up(branch: _Branch, module: nn.Module, found: dict[str, nn.Parameter | None]) -> None:
    module = bare(module)
    parameters = module._parameters
    for leaf, name in branch.leaves:
        # In a scripted module this is no dict and has no get().
        if leaf in parameters:
            found[name] = parameters[leaf]
    if branch.children:
        modules = module._modules
        for part, below in branch.children.items():
            child = modules[part] if part in modules else None  # noqa: SIM401
            if child is not None:
                _look_up(below, child, found)


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
