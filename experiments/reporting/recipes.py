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
    found: dict[str, Any] = config.get("hydra", {}).get("callbacks", {}).get("report", {})
    return found


def swept_by(recipe: Path) -> dict[str, list[str]]:
    """The options that a recipe varies, and their values; none if it is a single run."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    swept = config.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {name: str(values).split(",") for name, values in swept.items()}


def of_recipe(jobs: Jobs, recipe: Path) -> Jobs:
    """The jobs that the recipe itself asks for and no others, in its order.

    Of their options only the recipe's are left: not where and how a job was run.
    """
    allowed, apart = swept_by(recipe), kept_apart()
    found = []
    for job in jobs:
        own = {name: value for name, value in options_of(job).items() if name not in apart}
        if own.keys() == allowed.keys():
            places = [
                [has_options(own, {name: value}) for value in asked]
                for name, asked in allowed.items()
            ]
            if all(any(values) for values in places):
                options = [f"{name}={value}" for name, value in own.items()]
                place = [values.index(True) for values in places]
                found.append((place, {**job, "overrides": options}))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def as_configured(jobs: Jobs, recipe: Path) -> Jobs:
    """The jobs that came from the configuration as it is now, and not before a default changed."""
    composed: dict[tuple[str, ...], dict[str, Any]] = {}
    found = []
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        for job in jobs:
            options = tuple(o for o in job["overrides"] if not o.startswith("seed="))
            if options not in composed:  # composing takes a while, and seeds differ in no more
                overrides = [f"experiment={recipe.stem}", *options]
                composed[options] = plain(hydra.compose("config", overrides=overrides))
            if same_outcome(job["config"], composed[options] | {"seed": job["seed"]}):
                found.append(job)
    return found


def kept_apart() -> list[str]:
    """The options that say where and how a job runs, not what it is."""
    config: Any = OmegaConf.load(Path(CONFIGS) / "sweep" / "kept.yaml")
    names: list[str] = list(config.hydra.job.config.override_dirname.exclude_keys)
    return names
