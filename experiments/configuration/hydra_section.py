"""Checks of a configuration's ``hydra`` section: callbacks, launcher, sweeper and logging.

Hydra builds these before a run starts, and its logging imports and calls what it is given.  Only
known classes may be built, and logging may write to the console and to the job's file only.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.configuration.targets import (
    ConfigurationError,
    check_installed,
    checked_target,
    is_within,
    located,
    shown,
)

OURS = "hydra_plugins.ewc_sweeps"

JOBLIB = "hydra_plugins.hydra_joblib_launcher"

WITHIN = ("experiments.sweeping.samplers",)
"""The modules of what these objects may hold."""

PLACES: dict[str, tuple[type, tuple[str, ...]]] = {
    "callbacks": (Callback, ("experiments", "hydra.experimental.callbacks")),
    "launcher": (
        Launcher,
        (
            "hydra._internal.core_plugins",
            JOBLIB,
            "hydra_plugins.hydra_ray_launcher.ray_launcher",
            OURS,
        ),
    ),
    "sweeper": (Sweeper, ("hydra._internal.core_plugins", OURS)),
}
"""The places where Hydra builds objects: the base class, and the modules of its subclasses."""

EXTRAS = {
    JOBLIB: "experiments",
    "hydra_plugins.hydra_ray_launcher": "ray",
}
"""The extras that bring the plugins of others."""

RAY = {
    "init": ("address", "object_store_memory", "log_to_driver"),
    "remote": ("num_cpus", "num_gpus", "max_retries"),
}
"""What a configuration may tell Ray; other options of Ray run code on its nodes."""

HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")

FILES = (
    "${hydra.runtime.output_dir}/${hydra.job.name}.log",
    "hydra-${hydra.job.name}.log",
)

REFERENCES = ("ext://sys.stdout", "ext://sys.stderr", *FILES)
"""What a logging configuration may refer to: the console, and Hydra's files."""


def check_hydra_section(
    section: DictConfig, trusted: Sequence[str], arguments: Sequence[str] = ()
) -> None:
    """Reject what would run code, or copy the environment into files.

    Args:
        section: the composed ``hydra`` section, of which nothing is built yet.
        trusted: modules whose classes it may name too.
        arguments: the command line, which alone names a Ray cluster of another machine.

    Raises:
        ConfigurationError: it names another class, another logging handler, another cluster, or
            environment variables.
    """
    written = OmegaConf.to_container(section, resolve=False)
    assert isinstance(written, dict)
    for place in ("job_logging", "hydra_logging"):
        # Unresolved: the target of an interpolation may change before it is read.
        _check_logging(written[place], f"hydra.{place}")
    for place, (wanted, modules) in PLACES.items():
        tree = _resolved(section, place)
        if place == "launcher" and "ray" in tree:
            _check_ray(tree["ray"], arguments)
        for name, value in tree.items() if place == "callbacks" else [("", tree)]:
            option = f"hydra.{place}.{name}".rstrip(".")
            _check_built(value, option, wanted, (*modules, *trusted), (*WITHIN, *trusted))
        if place == "launcher" and is_within(tree["_target_"], [JOBLIB]):
            _check_joblib(tree)
        with open_dict(section):
            section[place] = tree  # without interpolations: what is built is what was checked
    for name in ("env_copy", "env_set"):
        if section.job[name]:
            raise ConfigurationError(
                f"Option 'hydra.job.{name}' is not taken: environment variables are set in the "
                "shell, before the command."
            )


def _resolved(section: DictConfig, place: str) -> dict[str, Any]:
    try:
        node = section[place]
        tree: Any = OmegaConf.to_container(node, resolve=True) if node else {}
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"Option 'hydra.{place}': {reason}") from error
    assert isinstance(tree, dict)
    return tree


def _check_built(
    value: Any, option: str, wanted: type, modules: Sequence[str], within: Sequence[str]
) -> None:
    """Check a node that Hydra builds, of ``modules``; nodes within it must be of ``within``."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            name, named = value["_target_"], f"{option}._target_"
            for plugin, extra in EXTRAS.items():
                if is_within(str(name), [plugin]):
                    check_installed(plugin, extra)
            checked_target(located(name, named, modules), name, named, [wanted])
        value = {f"{option}.{key}": element for key, element in value.items()}
    elif isinstance(value, list):
        value = {f"{option}.{index}": element for index, element in enumerate(value)}
    else:
        return
    for inner, element in value.items():
        _check_built(element, inner, object, within, within)


def _check_ray(ray: Any, arguments: Sequence[str]) -> None:
    """Check what Ray is told: a cluster runs what it is sent, and sends back what is run here."""
    for part, options in ray.items() if isinstance(ray, Mapping) else ():
        for name in options if isinstance(options, Mapping) else ():
            if name not in RAY.get(part, ()):
                allowed = " and ".join(RAY.get(part, ())) or "none"
                raise ConfigurationError(
                    f"Option 'hydra.launcher.ray.{part}.{name}' is not taken: allowed are "
                    f"{allowed}."
                )
    option = "hydra.launcher.ray.init.address"
    address = (ray.get("init") or {}).get("address")
    if address != "auto" and not any(a.startswith(f"{option}=") for a in arguments):
        raise ConfigurationError(
            f"Option {option!r} is {address!r}, which a file may not choose: it must be auto, or "
            f"be given on the command line, {option}=HOST:PORT."
        )


def _check_joblib(launcher: Mapping[str, Any]) -> None:
    """Check what joblib is told, by joblib itself, before a job begins."""
    from joblib import Parallel, effective_n_jobs

    options = {name: value for name, value in launcher.items() if not name.startswith("_")}
    try:
        Parallel(**options)
        effective_n_jobs(options["n_jobs"])
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"Option 'hydra.launcher': {reason}.") from error
    # joblib evaluates it later, in the sweep.
    given = options.get("pre_dispatch", "all")
    if not re.fullmatch(r"all|\d+|(\d+ ?\* ?)?n_jobs", str(given)):
        raise ConfigurationError(
            f"Option 'hydra.launcher.pre_dispatch' is {shown(given)}: allowed are all, a number, "
            "and a multiple such as 2*n_jobs."
        )


def _check_logging(value: Any, option: str) -> None:
    """Check the argument of ``logging.config.dictConfig``."""
    if isinstance(value, Mapping):
        for key, element in value.items():
            inner = f"{option}.{key}"
            allowed = {"()": (), "class": HANDLERS, "filename": FILES}.get(str(key))
            if allowed is not None and element not in allowed:
                names = " and ".join(allowed) or "none"
                raise ConfigurationError(f"Option {inner!r} is {element!r}: allowed are {names}.")
            _check_logging(element, inner)
    elif isinstance(value, list):
        for element in value:
            _check_logging(element, option)
    elif isinstance(value, str) and ("://" in value or "${" in value) and value not in REFERENCES:
        raise ConfigurationError(
            f"Option {option!r} is {value!r}: allowed are plain values and "
            f"{' and '.join(REFERENCES)}."
        )
