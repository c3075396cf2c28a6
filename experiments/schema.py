"""From a composed configuration to an :class:`~experiments.experiment.Experiment`.

The schema is the code itself: every node with a ``_target_`` is the call of a class, its
keys are checked against the signature and its values against the annotations, by pydantic.
A key that does not exist, a value of the wrong type and an argument the class refuses all
end as one :class:`ConfigurationError` that names the option and says what is allowed.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, get_origin, get_type_hints

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError


class ConfigurationError(ValueError):
    """An option is wrong; the message is one sentence for the person who set it."""


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


def build(node: Mapping[str, Any], path: str = "") -> Any:
    """The object that a configuration node describes, its children first.

    Args:
        node: ``{_target_: dotted.name, [_partial_: true], argument: value, ...}``.
        path: where the node stands, for messages.

    Raises:
        ConfigurationError: the node does not fit its target.
    """
    call = _call(node, path)
    arguments: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        option = f"{path}.{key}" if path else key
        if key not in call.hints and not call.takes_more:
            raise ConfigurationError(
                f"Unknown option {option!r}: allowed are {_listing(path, call.hints)}."
            )
        hint = call.hints.get(key, Any)
        if isinstance(value, Mapping) and "_target_" in value:
            arguments[key] = build(value, option)
        elif isinstance(value, Mapping) and get_origin(hint) is not dict:
            raise ConfigurationError(
                f"Option {option!r} has no _target_: a group of options names what it builds."
            )
        else:
            arguments[key] = _checked(value, hint, option)
    if call.is_partial:
        return partial(call.target, **arguments)
    for name in call.needed:
        if name not in arguments:
            option = f"{path}.{name}" if path else name
            raise ConfigurationError(f"Option {option!r} is missing.")
    try:
        return call.target(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path}: {error}" if path else str(error)) from error


NO_OUTCOME = ("data_root", "threads", "wandb")
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
    target = hydra.utils.get_object(str(one["_target_"])) if "_target_" in one else dict
    defaults = {n: p.default for n, p in inspect.signature(target).parameters.items()}
    missing = object()
    return all(
        _same(*(node.get(key, defaults.get(key, missing)) for node in (one, other)))
        for key in one.keys() | other.keys()
    )


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


def _call(node: Mapping[str, Any], path: str) -> _Call:
    name = node.get("_target_")
    try:
        target = hydra.utils.get_object(str(name))
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{path}._target_ is {name!r}: {error}") from error
    parameters = inspect.signature(target).parameters.values()
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    is_partial = bool(node.get("_partial_"))
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


def _listing(path: str, hints: Mapping[str, Any]) -> str:
    prefix = f"{path}." if path else ""
    return ", ".join(f"{prefix}{name}" for name in hints) or "none"
