"""The jobs and the report of a recipe in ``configs/experiment``."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import plain, same_outcome
from experiments.reporting.options import has_options, options_of
from experiments.reporting.tables import Jobs


def title_of(recipe: Path) -> str:
    """The first comment of a recipe, which says what it runs."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(
        line.removeprefix("# ") for line in lines if line.startswith("# ") and "@" not in line
    )


def report_of(recipe: Path) -> dict[str, Any]:
    """The options of a recipe's report: published figures and pictures."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    report: dict[str, Any] = config.get("hydra", {}).get("callbacks", {}).get("report", {})
    return report


def swept_by(recipe: Path) -> dict[str, list[str]]:
    """The options that a recipe varies, with their values; empty for a single run."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    swept = config.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {name: str(values).split(",") for name, values in swept.items()}


def of_recipe(jobs: Jobs, recipe: Path) -> Jobs:
    """The jobs that are part of the recipe, in its order."""
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
    """The jobs that ran with the present configuration, not with defaults that have changed."""
    composed: dict[tuple[str, ...], dict[str, Any]] = {}
    current = []
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        for job in jobs:
            options = tuple(o for o in job["overrides"] if not o.startswith("seed="))
            if options not in composed:  # composing is slow, and seeds differ in nothing else
                overrides = [f"experiment={recipe.stem}", *options]
                composed[options] = plain(hydra.compose("config", overrides=overrides))
            if same_outcome(job["config"], composed[options] | {"seed": job["seed"]}):
                current.append(job)
    return current
