"""From a composed configuration to an :class:`~experiments.experiment.Experiment`.

The schema is the code itself: every node with a ``_target_`` is the call of a class, its
keys are checked against the signature and its values against the annotations, by pydantic.
A key that does not exist, a value of the wrong type and an argument the class refuses all
end as one :class:`ConfigurationError` that names the option and says what is allowed.

A ``_target_`` is taken only where the annotation wants an object, and only if it names a
class of that kind (:mod:`experiments.configuration.targets`).
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from experiments.configuration.targets import (
    PACKAGES,
    ConfigurationError,
    checked_target,
    is_within,
    located,
)

__all__ = ["NO_OUTCOME", "ConfigurationError", "build", "plain", "same_outcome"]

Built = TypeVar("Built")


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, every interpolation resolved.

    Raises:
        ConfigurationError: an interpolation cannot be resolved, or a value is missing.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(str(error).splitlines()[0]) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def build(config: Mapping[str, Any], wanted: type[Built]) -> Built:
    """The object that a configuration describes, its children first.

    Args:
        config: ``{_target_: dotted.name, [_partial_: true], argument: value, ...}``; the
            modules in its ``trusted`` may be named by targets, which the command line checks.
        wanted: the class of which it must be.

    Raises:
        ConfigurationError: a node does not fit its target, or a target not its place.
    """
    trusted = _checked(config.get("trusted", []), list[str], "trusted")
    built: Built = _built(config, [wanted], "", (*PACKAGES, *trusted))
    return built


def _built(node: Mapping[str, Any], wanted: list[Any], path: str, modules: Sequence[str]) -> Any:
    call = _call(node, wanted, path, modules)
    arguments: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        option = _option(path, key)
        if key not in call.hints and not call.takes_more:
            raise ConfigurationError(
                f"Unknown option {option!r}: allowed are {_listing(path, call.hints)}."
            )
        arguments[key] = _argument(value, call.hints.get(key, Any), option, modules)
    if call.is_partial:
        return partial(call.target, **arguments)
    for name in call.needed:
        if name not in arguments:
            raise ConfigurationError(f"Option {_option(path, name)!r} is missing.")
    try:
        return call.target(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path}: {error}" if path else str(error)) from error


def _argument(value: Any, hint: Any, option: str, modules: Sequence[str]) -> Any:
    """A value, or what a node with a ``_target_`` describes where the annotation wants it."""
    wanted = _objects(hint, modules)
    if wanted and isinstance(value, Mapping):
        if "_target_" in value:
            return _built(value, wanted, option, modules)
    elif (target := _target_in(value)) is not None:
        raise ConfigurationError(
            f"Option {option!r} names the target {target!r}: it takes a value "
            f"({inspect.formatannotation(hint)}), nothing that is built."
        )
    if isinstance(value, Mapping) and get_origin(hint) is not dict:
        raise ConfigurationError(
            f"Option {option!r} has no _target_: a group of options names what it builds."
        )
    return _checked(value, hint, option)


def _objects(hint: Any, modules: Sequence[str]) -> list[Any]:
    """What a place may have built, by its annotation; empty where it takes a value.

    Objects are classes of ``modules`` and ``partial`` of one; ``None`` may stand beside them.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    members = tuple(member for member in members if member is not type(None))
    for member in members:
        is_wrapped = get_origin(member) is partial
        core = get_args(member)[0] if is_wrapped else get_origin(member) or member
        if not (inspect.isclass(core) and is_within(core.__module__, modules)):
            return []
    return list(members)


def _target_in(value: Any) -> Any:
    """The first ``_target_`` at any depth of a value, ``None`` if there is none."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return value["_target_"]
        value = list(value.values())
    if isinstance(value, list):
        targets = (_target_in(element) for element in value)
        return next((target for target in targets if target is not None), None)
    return None


NO_OUTCOME = ("data_root", "threads", "trusted", "wandb")
"""Options that do not decide what comes out: where data lie, how fast, and where it shows."""


def same_outcome(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations describe the same experiment.

    An option that one of them does not have, because there was none when it was written, has
    the default of what it belongs to.
    """
    return _same(
        {key: value for key, value in one.items() if key not in NO_OUTCOME},
        {key: value for key, value in other.items() if key not in NO_OUTCOME},
    )


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return bool(one == other)
    if one.get("_target_") != other.get("_target_"):
        return False
    defaults, missing = _defaults(one.get("_target_")), object()
    return all(
        _same(*(node.get(key, defaults.get(key, missing)) for node in (one, other)))
        for key in one.keys() | other.keys()
    )


def _defaults(name: object) -> dict[str, Any]:
    """The defaults of a target's arguments; those of trusted modules are not looked at."""
    if not (isinstance(name, str) and is_within(name, PACKAGES)):
        return {}
    parameters = inspect.signature(located(name, "_target_", PACKAGES)).parameters
    return {n: p.default for n, p in parameters.items()}


class _Call(NamedTuple):
    """What a node calls.

    Attributes:
        target: the class or function.
        is_partial: whether the code calls it later, with the rest of its arguments.
        hints: the types of the arguments that a node may give.
        needed: those of them without a default.
        takes_more: whether it takes arguments of any name, and checks them itself.
    """

    target: Any
    is_partial: bool
    hints: dict[str, Any]
    needed: list[str]
    takes_more: bool


def _call(node: Mapping[str, Any], wanted: list[Any], path: str, modules: Sequence[str]) -> _Call:
    name, option = node.get("_target_"), _option(path, "_target_")
    is_partial = bool(node.get("_partial_"))
    if is_partial:
        bounds = [get_args(member)[0] for member in wanted if get_origin(member) is partial]
    else:
        members = (get_origin(member) or member for member in wanted)
        bounds = [member for member in members if member is not partial]
    if not bounds:
        raise _misfit(path, wanted)
    target = located(name, option, modules)
    checked_target(target, name, option, bounds)
    parameters = inspect.signature(target).parameters.values()
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in named if p.default is p.empty]
    return _Call(
        target,
        is_partial,
        # Of a call in part, what has no default is given later, by the code.
        {p.name: hints.get(p.name, Any) for p in named if not (is_partial and p.name in needed)},
        needed,
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _checked(value: Any, hint: Any, option: str) -> Any:
    """``value`` as the annotation wants it."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type with a configuration of its own
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigurationError(f"Option {option!r} is {value!r}: {reason}.") from error


def _misfit(path: str, wanted: list[Any]) -> ConfigurationError:
    kinds = " or ".join(map(inspect.formatannotation, wanted))
    return ConfigurationError(
        f"Option {path!r} must be {kinds}: _partial_: true makes a partial, any other target an "
        "object."
    )


def _option(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _listing(path: str, hints: Mapping[str, Any]) -> str:
    return ", ".join(_option(path, name) for name in hints) or "none"
