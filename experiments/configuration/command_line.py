"""What the command lines share: the folder of configurations, and messages for wrong options."""

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any

import hydra
import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.configuration.hydra_section import check_hydra_section
from experiments.configuration.paths import check_paths
from experiments.configuration.targets import ConfigurationError

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")

MOST_JOBS = 64
"""Jobs of a sweep that are looked at for the one that a wrong option belongs to."""

SAID = (
    (
        r"Ambiguous value for argument '([^']+)'",
        "{!r} is several values: -m runs one job for each.",
    ),
    (
        r"Sweep parameters '([^']+)' requires --multirun",
        "{!r} is searched: -m hydra/sweeper=optuna runs a job for each value that it tries.",
    ),
    (
        "BasicSweeper does not support sweep type",
        "An interval is searched with hydra/sweeper=optuna; without it an option takes a list of "
        "values, such as 1,2,3.",
    ),
    (
        r"Error parsing override '([^'=]+)'\s+missing EQUAL",
        "{!r} has no value: an option is written OPTION=VALUE.",
    ),
)
"""How messages of Hydra begin, and what is said instead."""


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's loader with a check of what configuration files may ask of Hydra.

    All configurations of runs, sweeps and jobs go through it before Hydra builds or calls what
    they name.

    Raises:
        ConfigurationError: files set ``trusted``, name a folder outside, or have Hydra run code.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.trusted = _trusted(sys.argv[1:])
        self._jobs: dict[tuple[str, ...], bytes] = {}

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        """The configuration of a job.

        Hydra asks for it twice, once to check all jobs before the first one runs.  Composing takes
        longer than a finished job, so it is done once.
        """
        key = tuple(sweep_overrides)
        if key in self._jobs:
            # Bytes that this object made itself: a copy, as Hydra changes what it gets.
            composed: DictConfig = pickle.loads(self._jobs.pop(key))  # noqa: S301
            return composed
        composed = super().load_sweep_config(master_config, sweep_overrides)
        self._jobs[key] = pickle.dumps(composed)
        return composed

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        """One file; Hydra would merge it into a plugin's configuration of the same name."""
        without: Any = _WithoutSchemas(repo)
        return super()._load_single_config(default, without)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """The composed configuration, checked."""
        config = super().load_configuration(
            config_name, overrides, run_mode, from_shell, validate_sweep_overrides
        )
        # The overrides of a job do not show whether the command line or a file has them.
        written = OmegaConf.to_container(config, resolve=False)
        assert isinstance(written, dict)
        if (trusted := written.get("trusted", [])) != self.trusted:
            raise ConfigurationError(
                f"Option 'trusted' is {trusted!r} where the command line has {self.trusted}: a "
                "file or a sweep cannot trust modules, only the command line, trusted=[MODULE]."
            )
        check_hydra_section(config.hydra, self.trusted, sys.argv[1:])
        check_paths(config, sys.argv[1:])
        hydra_section = written["hydra"]
        for folder in (hydra_section["run"]["dir"], hydra_section["sweep"]["dir"]):
            remember_folders(str(folder))
        return config


class _WithoutSchemas:
    """A repository of configurations without those that plugins store as schemas."""

    def __init__(self, repository: Any) -> None:
        self.repository = repository

    def __getattr__(self, name: str) -> Any:
        return getattr(self.repository, name)

    def get_schema_source(self) -> Any:
        raise ConfigLoadError("no schema")


@contextmanager
def _checked_loader() -> Iterator[None]:
    """Replace Hydra's loader by the checked one; Hydra has no public way to do so."""
    module: Any = hydra._internal.hydra
    loader = module.ConfigLoaderImpl
    module.ConfigLoaderImpl = CheckedLoader
    try:
        yield
    finally:
        module.ConfigLoaderImpl = loader


def _trusted(arguments: list[str]) -> list[str]:
    """The value of ``trusted`` on the command line."""
    options = [a for a in arguments if a.lstrip("+").startswith("trusted=")]
    parsed = OverridesParser.create().parse_overrides(options)
    values = [override.value() for override in parsed]
    return list(values[-1]) if values and isinstance(values[-1], list) else []


def flags_first(arguments: list[str]) -> list[str]:
    """The arguments with flags before options, as Hydra's parser reads no options after a flag.

    ``strategy=naive,ewc -m seed=0,1`` becomes ``-m strategy=naive,ewc seed=0,1``.
    """
    options = get_args_parser().parse_intermixed_args(arguments).overrides
    flags, left = [], list(options)
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            flags.append(argument)
    return [*flags, *options]


def ended_briefly(command: Callable[[], Any], config_name: str) -> None:
    """Run a command line; a wrong option gives a short message, not a traceback.

    Args:
        command: the function that ``hydra.main`` decorates.
        config_name: the main configuration, for the options that are allowed.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        with _checked_loader():
            command()
        return
    # With this variable Hydra raises instead of printing a traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _checked_loader():
            command()
    except (
        ConfigurationError,
        FloatingPointError,
        HydraException,
        OmegaConfBaseException,
    ) as error:
        sys.exit(f"error: {short_message(error, config_name)}")
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        sys.exit(f"error: {short_message(error, config_name)}")
    except ConnectionError as error:  # of a launcher's cluster
        sys.exit(f"error: {sentence(error)}")
    except OSError as error:  # of the folders that Hydra makes
        sys.exit(
            f"error: {sentence(error)}; hydra.run.dir=DIR chooses another folder for a run, "
            "hydra.sweep.dir=DIR for a sweep."
        )
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def remember_folders(run_directory: str) -> None:
    """Note which folders are there before a run, for :func:`remove_empty`.

    Args:
        run_directory: the folder as the configuration writes it; what follows an interpolation is
            the run's own.
    """
    folder = Path.cwd() / run_directory.partition("${")[0]
    _there.update(path for path in (folder, *folder.parents) if path.exists())


_there: set[Path] = set()


def remove_empty(directory: Path) -> None:
    """Remove the folder of this run, and those above it that were not there, while empty."""
    directory = directory.absolute()
    for folder in (directory, *list(directory.parents)[:2]):
        if folder in _there:
            return
        try:
            folder.rmdir()
        except OSError:
            return


def flags_of(hydra_config: Any) -> list[str]:
    """The flags that a command needs besides its options: the folders of configurations it adds.

    Args:
        hydra_config: Hydra's configuration.
    """
    sources = hydra_config.runtime.config_sources
    added = [source.path for source in sources if source.provider == "command-line"]
    return [f"--config-dir={os.path.relpath(path)}" for path in added]


def sentence(error: Exception) -> str:
    """The first line of an error's message; for an error of the system with the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def short_message(error: Exception, config_name: str) -> str:
    """One sentence or two for a wrong command line: the option, and what is allowed."""
    text = str(error)
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return _unknown_option(unknown[1], config_name)
    if choice := re.search(
        r"Could not find '([^']+)'\s+Available options in.*?:\n(.*?)\n\S", text, re.S
    ):
        return f"Could not find {str(choice[1])!r}: allowed are {', '.join(choice[2].split())}."
    for pattern, said in SAID:
        if known := re.match(pattern, text):
            return said.format(*known.groups())
    if "Config group override must be a string" in text:
        return _no_group(config_name)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])


def _no_group(config_name: str) -> str:
    """The message for a group whose choice on the command line does not exist."""
    for override in sys.argv[1:]:
        group, _, value = override.partition("=")
        names = sorted(path.stem for path in (Path(CONFIGS) / group).glob("*.yaml"))
        if names and value not in names:
            return f"Option {group!r} is {value!r}: allowed are {', '.join(names)}."
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        names = _names(hydra.compose(config_name), "", config_name)
    return f"An option chooses nothing: allowed are {', '.join(names)}."


def _unknown_option(option: str, config_name: str) -> str:
    """What is wrong with an option that the first job to fail does not have."""
    for overrides in _jobs():
        try:
            with _checked_loader(), hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
                config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
        except (ConfigurationError, HydraException, OmegaConfBaseException):
            continue
        if option and _node(config, option) is not None:
            continue  # another job of the sweep is at fault
        parent = option.rpartition(".")[0]
        while not isinstance(_node(config, parent), DictConfig):
            parent = parent.rpartition(".")[0]
        names = _names(_node(config, parent), parent, config_name)
        group = parent.replace(".", "/")
        choice = f"{group}={config.hydra.runtime.choices.get(group)}"
        if names:
            where = f" with {choice}" if choice in overrides else ""
            return f"Unknown option {option!r}{where}: allowed are {', '.join(names)}."
        if group not in config.hydra.runtime.choices:
            return f"Unknown option {option!r}: {parent!r} has no options."
        others = ", ".join(_choices_with(option, group, config_name))
        allowed = f"an option of {others}" if others else "it has no options"
        return f"Unknown option {option!r} with {choice}: {allowed}."
    return f"Unknown option {option!r}."


def _choices_with(option: str, group: str, config_name: str) -> list[str]:
    """The choices of a group that have an option, as the command line has them."""
    choices = []
    with _checked_loader(), hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        for path in sorted((Path(CONFIGS) / group).glob("*.yaml")):
            choice = f"{group}={path.stem}"
            try:
                config = hydra.compose(config_name, overrides=[choice], return_hydra_config=True)
            except ConfigurationError:  # its plugin is not installed
                continue
            if _node(config, option) is not None:
                choices.append(choice)
    return choices


def _jobs() -> Iterator[list[str]]:
    """The choices of every job that the command line asks for, and no choice at last."""
    choices = []
    for override in sys.argv[1:]:
        if re.match(r"[\w/@+~]+=[\w/,]+$", override):
            name, _, values = override.partition("=")
            choices.append([f"{name}={value}" for value in values.split(",")])
    for job in islice(product(*choices), MOST_JOBS):
        yield list(job)
    yield []


def _node(config: Any, option: str) -> Any:
    """What stands in a configuration under a dotted name; ``None`` if nothing does."""
    for key in filter(None, option.split(".")):
        if not isinstance(config, DictConfig) or key not in config:
            return None
        config = config._get_node(key)
    return config


def _names(node: Any, parent: str, config_name: str) -> list[str]:
    """The options in a node of a configuration, by their whole names."""
    names = [str(key) for key in node if not str(key).startswith("_")]
    if parent:
        return [f"{parent}.{name}" for name in names]
    return [*(name for name in names if name != "hydra"), *_empty_groups(config_name)]


def _empty_groups(config_name: str) -> list[str]:
    """The groups without a choice in the main configuration."""
    config = OmegaConf.load(Path(CONFIGS) / f"{config_name}.yaml")
    defaults = OmegaConf.select(config, "defaults") or []
    entries = [entry for entry in defaults if isinstance(entry, DictConfig)]
    return sorted(str(group) for entry in entries for group in entry if entry[group] is None)
