"""Checks of the folders that configuration files name.

A configuration may come from somebody else.  Only the command line may choose a folder anywhere; a
file's folders lie in the folder where the command starts, its data also in that of ``EWC_DATA``.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.configuration.targets import ConfigurationError, shown

WRITTEN = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.callbacks.report.kept",
    "hydra.launcher.temp_folder",
)
"""The options with a folder or a file that is written."""

DATA = "data_root"

KNOWN = re.compile(
    r"\$\{(?:now:(?P<time>[^{}]*)|hydra[.:](?P<name>(?:job|runtime\.choices)\.\w+))\}"
)
"""Interpolations that a folder may have: the time, and names of the job and of its choices."""


def check_paths(config: DictConfig, arguments: Sequence[str]) -> None:
    """Check that folders that the command line does not name lie inside.

    Args:
        config: the composed configuration, with its ``hydra`` section.
        arguments: the command line.

    Raises:
        ConfigurationError: a file names a folder outside.
    """
    named = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    for option in (*WRITTEN, DATA):
        if any(option == name or option.startswith(f"{name}.") for name in named):
            continue
        written = _written(config, option)
        if written is None:
            continue
        if not lies_inside(option, _filled(str(written), config)):
            raise ConfigurationError(
                f"Option {option!r} is {shown(written)}, which a file may not choose: it must be a "
                f"printable name in the present folder, or be given on the command line, "
                f"{option}=PATH."
            )


def lies_inside(option: str, text: str) -> bool:
    """Whether a folder lies where a file may choose it."""
    roots = [Path.cwd()]
    if option == DATA and "EWC_DATA" in os.environ:
        roots.append(Path(os.environ["EWC_DATA"]))
    folder = Path(os.path.normpath(Path.cwd() / Path(text).expanduser()))
    # A line break would begin a line of the script that Slurm gets.
    is_plain = "${" not in text and text.isprintable()
    return is_plain and any(folder.is_relative_to(root.absolute()) for root in roots)


def _filled(text: str, config: DictConfig) -> str:
    """A folder with the names that it takes from the configuration, as a file sets them too."""

    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match["time"]  # a format, whose other characters stay
        name = OmegaConf.select(config, f"hydra.{match['name']}")
        return "x" if name is None else str(name)  # the number of a job comes later

    return KNOWN.sub(value, text)


def _written(config: DictConfig, option: str) -> object:
    """What a configuration says before interpolation; ``None`` if nothing."""
    node: object = OmegaConf.to_container(config, resolve=False)
    for key in option.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
