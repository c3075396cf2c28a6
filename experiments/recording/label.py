"""What a run is called in W&B: name, tags, group and command, from its options."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.configuration.schema import option_of, sets_no_outcome

LONGEST_NAME = 128
"""The largest number of characters of a name or a group that W&B takes."""

LONGEST_TAG = 64
"""The largest number of characters of a tag."""

_APART = ("benchmark", "strategy", "experiment", "sweep", "seed")
"""Options that a name has in another way, or the group."""


@dataclass(frozen=True)
class Label:
    """What a run is called in W&B.

    Attributes:
        name: the name.
        group: the sweep; ``None`` for a run alone.
        tags: words to find the run by.
        job_type: ``sweep`` for a job of a sweep, ``train`` for a run alone.
        notes: the command.
        choices: what was chosen, by the name of the configuration's group.
    """

    name: str
    group: str | None = None
    tags: Sequence[str] = ()
    job_type: str = "train"
    notes: str | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)


def label_of(
    choices: Mapping[str, str | None],
    overrides: Sequence[str],
    seed: int,
    sweep: Path | None = None,
    flags: Sequence[str] = (),
) -> Label:
    """The label of a run, with all options that were given and change its results.

    Args:
        choices: what was chosen, by the name of the configuration's group.
        overrides: the options of the command line.
        seed: the seed.
        sweep: the folder of the sweep; ``None`` for a run alone.
        flags: the flags of the command line that its options need.
    """
    chosen = {
        group: choice
        for group, choice in choices.items()
        if choice and not group.startswith("hydra")
    }
    first = [chosen[group] for group in ("benchmark", "strategy")]
    given = _named(overrides)
    recipe = [chosen[group] for group in ("experiment", "sweep") if group in chosen]
    tags = [*first, *recipe, *given]
    command = f"python -m experiments.run {shlex.join([*flags, *overrides])}".strip()
    group, last = None, f" seed={seed}"
    if sweep:
        raw = _sweep_overrides(sweep)
        group = " ".join([*(recipe or _swept(raw)), _dated(sweep)])[:LONGEST_NAME]
        if raw:
            command += f"\na job of: python -m experiments.run -m {shlex.join([*flags, *raw])}"
    return Label(
        name=f"{' '.join([*first, *given])[: LONGEST_NAME - len(last)]}{last}",
        group=group,
        tags=[tag for tag in dict.fromkeys(tags) if len(tag) <= LONGEST_TAG],
        job_type="sweep" if sweep else "train",
        notes=command,
        choices={**chosen, "seed": seed},
    )


def _named(overrides: Sequence[str]) -> list[str]:
    """Overrides as ``key=value``, with the key's last word where it is the only one."""
    options: dict[str, str] = {}
    for override in overrides:
        key = option_of(override)
        if key not in _APART and not sets_no_outcome(override):
            options[key] = override.partition("=")[2]
    last = {key: re.split(r"[./]", key)[-1] for key in options}
    words = list(last.values())
    return [
        f"{last[key] if words.count(last[key]) == 1 else key}={value}"
        for key, value in options.items()
    ]


def _sweep_overrides(sweep: Path) -> list[str]:
    """The options of the sweep's command, which Hydra keeps; none without its file."""
    path = sweep / "multirun.yaml"
    if not path.exists():
        return []
    return list(OmegaConf.select(OmegaConf.load(path), "hydra.overrides.task", default=[]))


def _swept(overrides: Sequence[str]) -> list[str]:
    """The last words of the options with several values."""
    keys = [
        option_of(override)
        for override in overrides
        if re.search(r",|^(choice|range|interval|tag|glob)\(", override.partition("=")[2])
    ]
    return [re.split(r"[./]", key)[-1] for key in keys]


def _dated(folder: Path) -> str:
    """The name of a folder, with that of its parent where it is a date."""
    date = folder.parent.name
    return f"{date} {folder.name}" if re.fullmatch(r"\d{4}-\d\d-\d\d", date) else folder.name
