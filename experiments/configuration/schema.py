"""From a composed configuration to an :class:`~experiments.experiment.Experiment`.

The code is the schema.  Every node with a ``_target_`` is the call of a class.  Its keys are
checked against the signature, and its values against the annotations by pydantic.  An unknown key,
a value of the wrong type or an argument that the class rejects raises a
:class:`ConfigurationError`, which names the option and what is allowed.

A ``_target_`` is allowed only where the annotation is an object, and only if it names a class of
that kind (:mod:`experiments.configuration.targets`).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
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
    shown,
)

__all__ = [
    "NO_OUTCOME",
    "ConfigurationError",
    "build",
    "deciding",
    "option_of",
    "plain",
    "same_outcome",
    "sets_no_outcome",
]

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


def build(
    config: Mapping[str, Any],
    wanted: type[Built],
    path: str = "",
    trusted: Sequence[str] | None = None,
) -> Built:
    """The object that a configuration describes, its children first.

    Args:
        config: ``{_target_: dotted.name, [_partial_: true], argument: value, ...}``.
        wanted: the class of the object.
        path: the option that holds the configuration, for messages.
        trusted: modules that targets may name besides the known packages; ``None`` for those in
            the ``trusted`` of a whole configuration, which the command line checks.

    Raises:
        ConfigurationError: a node does not fit its target, or a target does not fit its place.
    """
    if trusted is None:
        trusted = _checked(config.get("trusted", []), list[str], "trusted")
    built: Built = _built(config, [wanted], path, (*PACKAGES, *trusted))
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
    elif wanted:
        if value is None and type(None) in get_args(hint):
            return None
        raise ConfigurationError(
            f"Option {option!r} is {shown(value)}: it takes a group of options with a _target_, as "
            f"{option.replace('.', '/')}=CHOICE chooses one."
        )
    elif (target := _target_in(value)) is not None:
        raise ConfigurationError(
            f"Option {option!r} names the target {shown(target)}: it takes a value "
            f"({inspect.formatannotation(hint)}), nothing that is built."
        )
    if isinstance(value, Mapping) and get_origin(hint) is not dict:
        raise ConfigurationError(
            f"Option {option!r} has no _target_: a group of options names what it builds."
        )
    return _checked(value, hint, option)


def _objects(hint: Any, modules: Sequence[str]) -> list[Any]:
    """The classes of which a place may build an object; empty where it takes a value.

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


NO_OUTCOME = ("data_root", "trusted", "wandb", "training.checkpoint_minutes")
"""Options that do not change the results: the data's folder, checkpoints and the reporting."""


def deciding(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The options of a configuration without those that do not change the results."""
    options: dict[str, Any] = {}
    for key, value in config.items():
        if (option := _option(path, key)) not in NO_OUTCOME:
            options[key] = deciding(value, option) if isinstance(value, Mapping) else value
    return options


def option_of(override: str) -> str:
    """The option that an override of the command line adds, sets or deletes."""
    return override.lstrip("+~").partition("=")[0]


def sets_no_outcome(override: str) -> bool:
    """Whether an override of the command line sets an option that does not change the results."""
    name = option_of(override)
    return any(name == option or name.startswith(f"{option}.") for option in NO_OUTCOME)


def same_outcome(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two configurations describe the same experiment.

    A configuration from before an option existed has the option's default.
    """
    return _same(deciding(first), deciding(second))


def _same(first: Any, second: Any) -> bool:
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return bool(first == second)
    if first.get("_target_") != second.get("_target_"):
        return False
    # Only a missing option needs the target's defaults, as importing the target takes seconds.
    defaults = _defaults(first.get("_target_")) if first.keys() != second.keys() else {}
    missing = object()
    return all(
        _same(*(node.get(key, defaults.get(key, missing)) for node in (first, second)))
        for key in first.keys() | second.keys()
    )


def completed(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Configurations with the options that only later ones have, at their defaults."""
    known: dict[tuple[str, Any], set[str]] = {}
    for config in configs:
        for path, node in _nodes(config):
            known.setdefault((path, node.get("_target_")), set()).update(node)
    return [_completed(config, known) for config in configs]


def _nodes(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All groups of options in a configuration, with their places."""
    yield path, node
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _nodes(value, _option(path, key))


def _completed(
    node: Mapping[str, Any], known: Mapping[tuple[str, Any], set[str]], path: str = ""
) -> dict[str, Any]:
    full = {
        key: _completed(value, known, _option(path, key)) if isinstance(value, Mapping) else value
        for key, value in node.items()
    }
    if missing := known[path, node.get("_target_")] - node.keys():
        defaults = _defaults(node.get("_target_"))
        full |= {key: defaults[key] for key in sorted(missing & defaults.keys())}
    return full


def _defaults(name: object) -> dict[str, Any]:
    """The defaults of a target's arguments; none for classes of trusted modules."""
    if not (isinstance(name, str) and is_within(name, PACKAGES)):
        return {}
    parameters = inspect.signature(located(name, "_target_", PACKAGES)).parameters
    return {n: p.default for n, p in parameters.items()}


class _Call(NamedTuple):
    """What a node calls.

    Attributes:
        target: the class or function.
        is_partial: whether the code calls it later, with the remaining arguments.
        hints: the types of the arguments that a node may set.
        needed: the arguments without a default.
        takes_more: whether the target takes arguments of any name.
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
        # The arguments of a partial without a default are set later, by the code.
        {p.name: hints.get(p.name, Any) for p in named if not (is_partial and p.name in needed)},
        needed,
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _checked(value: Any, hint: Any, option: str) -> Any:
    """``value``, converted to the annotation's type."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the type has a configuration already
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigurationError(f"Option {option!r} is {shown(value)}: {reason}.") from error


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
