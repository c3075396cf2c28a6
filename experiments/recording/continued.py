"""How an interrupted run is continued: ``python -m experiments.run resume=DIR``."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from experiments.configuration.command_line import flags_of
from experiments.configuration.paths import DATA, lies_inside
from experiments.configuration.schema import NO_OUTCOME, option_of, sets_no_outcome
from experiments.configuration.targets import ConfigurationError
from experiments.recording.folder import OWNER, read_owner

RESUME = "resume="

CONFIG_DIR = "--config-dir="


def with_resume(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, with the options of the run for ``resume=DIR``.

    The options come from the run's ``run.json``.  Its ``trusted`` does not, as only the command
    line may trust modules.

    Raises:
        ConfigurationError: the folder holds no run, or an option changes the results.
    """
    given = [argument for argument in arguments if argument.startswith(RESUME)]
    others = [argument for argument in arguments if not argument.startswith(RESUME)]
    if not given:
        return others
    flags = [argument for argument in others if argument.startswith(CONFIG_DIR)]
    others = [argument for argument in others if argument not in flags]
    for argument in others:
        if not sets_no_outcome(argument):
            raise ConfigurationError(
                f"resume=DIR continues a run with its own options, so {argument!r} is not taken: "
                f"allowed are those that do not change the results, {', '.join(NO_OUTCOME)}, and "
                f"{CONFIG_DIR}DIR."
            )
    directory = Path(given[-1].removeprefix(RESUME))
    if directory == Path() or not (directory / OWNER).exists():
        raise ConfigurationError(
            f"{given[-1]} names no folder of a run: resume=DIR takes one that a run has begun to "
            f"write, with {OWNER}."
        )
    overrides = read_owner(directory).get("overrides")
    if not isinstance(overrides, list) or not all(map(_is_option, overrides)):
        raise ConfigurationError(
            f"{directory / OWNER} does not say how a run was started: resume=DIR takes the folder "
            "of a run. A sweep is continued by its own command with hydra.sweep.dir=DIR."
        )
    replaced = {"trusted", *map(option_of, others)}
    kept = [override for override in overrides if option_of(override) not in replaced]
    for override in kept:
        if option_of(override) == DATA and not lies_inside(DATA, override.partition("=")[2]):
            raise ConfigurationError(
                f"{directory / OWNER} has {override}, which a file may not choose: give it again, "
                f"resume={directory} {override}."
            )
    quoted = str(directory).replace("\\", "\\\\").replace("'", "\\'")
    # A recipe may make a sweep of a command; this is one job of it.
    return [*flags, *kept, *others, f"hydra.run.dir='{quoted}'", "hydra.mode=RUN"]


def command_to_continue(directory: Path, hydra_config: Any) -> str:
    """The command that continues a run, for a message.

    Args:
        directory: the run's folder.
        hydra_config: Hydra's configuration.
    """
    if hydra_config.mode == RunMode.MULTIRUN:
        sweep = os.path.relpath(Path(hydra_config.runtime.cwd) / hydra_config.sweep.dir)
        return f"the same command with hydra.sweep.dir={sweep}"
    words = [*flags_of(hydra_config), f"{RESUME}{os.path.relpath(directory)}"]
    # Trusted modules and a folder of data elsewhere are taken from the command line only.
    words += [
        override
        for override in hydra_config.overrides.task
        if option_of(override) == "trusted"
        or (option_of(override) == DATA and not lies_inside(DATA, override.partition("=")[2]))
    ]
    return f"python -m experiments.run {shlex.join(words)}"


def _is_option(override: Any) -> bool:
    """Whether an entry of ``run.json`` is an option of a run, and none of Hydra or its flags."""
    pattern = r"[+~]*(?!hydra\b)[A-Za-z_][\w/@.]*(=.*)?"
    return isinstance(override, str) and re.fullmatch(pattern, override, re.S) is not None
