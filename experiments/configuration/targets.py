"""The classes that a configuration may name; a name is checked before it is imported.

A configuration may come from somebody else.  A ``_target_`` must therefore name a class of the
packages below, or of a module that the user trusts on the command line.  The class is compared
with the annotation of its place before anything is called.
"""

import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

LONGEST = 80
"""The characters of a value in a message."""


class ConfigurationError(ValueError):
    """An option is wrong; the message is one sentence for the user."""


def shown(value: object) -> str:
    """A plain value as a message shows it, in one short line; without the import of torch."""
    try:
        text = repr(value)
    except ValueError:  # an integer with too many digits
        text = "a large number"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


PACKAGES = ("ewc", "experiments", "torch", "torchvision", "avalanche", "timm")
"""The packages whose classes a configuration may name."""


VARIABLES = ("EWC_DATA", "HOME", "SCRATCH", "TMPDIR", "USER", "WANDB_MODE")
"""The environment variables that a configuration may read; it is logged, so others stay out."""


def _variable(name: str, *default: Any) -> Any:
    """The value of ``${oc.env:NAME,default}``."""
    if name not in VARIABLES and not name.startswith("SLURM_"):
        raise ConfigurationError(
            f"The environment variable {name!r} is not read: allowed in a configuration are "
            f"{', '.join(VARIABLES)} and SLURM_*."
        )
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _variable, replace=True)


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a dotted name is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def located(name: object, option: str, modules: Sequence[str]) -> Any:
    """The object of a dotted name; nothing is imported for a name outside ``modules``.

    Args:
        name: the dotted name.
        option: where the configuration names it, for messages.
        modules: the modules in which it may lie.

    Raises:
        ConfigurationError: the name is not allowed, or there is no such object.
    """
    if not isinstance(name, str) or not is_within(name, modules):
        packages = f"{', '.join(modules)} and " if modules else ""
        raise ConfigurationError(
            f"Option {option!r} is {shown(name)}: allowed are classes of {packages}modules that "
            "the command line trusts, trusted=[MODULE]."
        )
    try:
        return hydra.utils.get_object(name)
    except (ImportError, ValueError, HydraException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"Option {option!r} is {shown(name)}: {reason}") from error


def check_installed(module: str, extra: str) -> None:
    """Check that an optional package is there, before it is imported.

    Args:
        module: the package.
        extra: the extra that brings it.

    Raises:
        ConfigurationError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"{module} is not installed: pip install -e '.[{extra}]' installs it."
        )


def checked_target(target: Any, name: object, option: str, wanted: Sequence[type]) -> None:
    """Check, before a target is called, that it is a class that its place allows.

    Args:
        target: a class.
        name: its dotted name.
        option: where the configuration names it, for messages.
        wanted: the classes of which it must make an instance.

    Raises:
        ConfigurationError: the target is not one of these classes or a subclass.
    """
    if not (inspect.isclass(target) and issubclass(target, tuple(wanted))):
        names = " or ".join(f"{c.__module__}.{c.__qualname__}" for c in wanted)
        kind = "class" if inspect.isclass(target) else type(target).__name__
        raise ConfigurationError(
            f"Option {option!r} is {shown(name)}: allowed are {names} and its subclasses, not this "
            f"{kind}."
        )
