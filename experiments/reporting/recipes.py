"""What a recipe in ``configs/experiment`` asks for: its jobs and its report."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import plain, same_outcome
from experiments.reporting.tables import Jobs, has_options, options_of


def title_of(recipe: Path) -> str:
    """The first comment of a recipe: what it runs."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(
        line.removeprefix("# ") for line in lines if line.startswith("# ") and "@" not in line
    )


def report_of(recipe: Path) -> dict[str, Any]:
    """What a recipe says of its report: published figures and pictures."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    report: dict[str, Any] = config.get("hydra", {}).get("callbacks", {}).get("report", {})
    return report


def swept_by(recipe: Path) -> dict[str, list[str]]:
    """The options that a recipe varies, and their values; none if it is a single run."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    swept = config.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {name: str(values).split(",") for name, values in swept.items()}


def of_recipe(jobs: Jobs, recipe: Path) -> Jobs:
    """The jobs that the recipe itself asks for and no others, in its order."""
    swept = swept_by(recipe)
    placed = []
    for job in jobs:
        given = options_of(job)
        places = [
            [has_options(given, {name: value}) for value in values]
            for name, values in swept.items()
        ]
        if given.keys() == swept.keys() and all(any(matches) for matches in places):
            placed.append(([matches.index(True) for matches in places], job))
    return [job for _, job in sorted(placed, key=lambda pair: pair[0])]


def as_configured(jobs: Jobs, recipe: Path) -> Jobs:
    """The jobs that came from the configuration as it is now, and not before a default changed."""
    composed: dict[tuple[str, ...], dict[str, Any]] = {}
    current = []
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        for job in jobs:
            options = tuple(o for o in job["overrides"] if not o.startswith("seed="))
            if options not in composed:  # composing takes a while, and seeds differ in no more
                overrides = [f"experiment={recipe.stem}", *options]
                composed[options] = plain(hydra.compose("config", overrides=overrides))
            if same_outcome(job["config"], composed[options] | {"seed": job["seed"]}):
                current.append(job)
    return current
