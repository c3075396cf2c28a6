"""RESULTS.md, written from kept results."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.targets import ConfigurationError
from experiments.recording.files import write_whole
from experiments.recording.kept import read_kept
from experiments.reporting.goals import Goal, goals_table
from experiments.reporting.options import has_options, options_of
from experiments.reporting.picture_file import write_picture
from experiments.reporting.recipes import (
    as_configured,
    of_recipe,
    report_of,
    swept_by,
    title_of,
)
from experiments.reporting.sweep_pictures import OF_SWEEPS
from experiments.reporting.tables import Jobs, finished, markdown, sweep_table, versions_of

INTRODUCTION = """\
# Results

Tables show the average test accuracy over all tasks after the last one, and forgetting, in percent.
They are means ± standard errors over the seeds; a value without an error has one seed. Published
figures have other seeds, and other settings where a remark says so. Seconds are of a shared
machine: they do not compare methods. `python -m experiments.results` writes this page from the
kept jobs, `results/RECIPE.jsonl`. The command above a table runs the jobs that are missing
(`EWC_DATA` names the folder of MNIST). To run all jobs again, remove the file first."""


def section(jobs: Jobs, recipe: Path, pictures: Path) -> str:
    """The heading, the command, the table and the pictures of one recipe."""
    report, done = report_of(recipe), finished(jobs)
    lines = [
        f"## {recipe.stem}",
        "",
        title_of(recipe),
        "",
        f"```\npython -m experiments.run experiment={recipe.stem}\n```",
        "",
        *markdown(*sweep_table(jobs, report.get("published"), list(swept_by(recipe)))),
    ]
    if not done:  # all jobs diverged
        return "\n".join(lines)
    for name in report.get("pictures", ["over_tasks"]):
        if name not in OF_SWEEPS:
            raise ConfigurationError(
                f"{recipe}: a picture must be one of {', '.join(OF_SWEEPS)}, got {name!r}."
            )
        figure = OF_SWEEPS[name](done, recipe.stem)
        path = pictures / f"{recipe.stem}_{name}.png"
        write_picture(figure, path, dpi=110)
        lines += ["", f"![{name.replace('_', ' ')}]({pictures.name}/{path.name})"]
    versions = (f"{name} {version}" for name, version in versions_of(done).items())
    lines += ["", f"Versions: {', '.join(versions)}."]
    return "\n".join(lines)


def missing_table(recipes: Sequence[Path], jobs: Mapping[str, Jobs]) -> list[str]:
    """The table of sweeps with missing jobs, and of values without any job; empty without any."""
    rows = []
    for recipe in recipes:
        swept, options = swept_by(recipe), [options_of(job) for job in jobs[recipe.stem]]
        size = math.prod(len(values) for values in swept.values())
        without = [
            f"{name}={value}"
            for name, values in swept.items()
            for value in values
            if name != "seed" and not any(has_options(given, {name: value}) for given in options)
        ]
        if swept and len(options) < size:
            rows.append([recipe.stem, str(len(options)), str(size), ", ".join(without)])
    if not rows:
        return []
    columns = ["recipe", "jobs kept", "jobs in all", "without any job"]
    return ["## What is missing", "", "The recipe's command runs it.", "", *markdown(columns, rows)]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.results", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR",
        help="the folder of kept results; default: results/",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=Path, default=Path("RESULTS.md"), metavar="FILE",
        help="the page to write; default: RESULTS.md",
    )  # fmt: skip
    arguments = parser.parse_args()
    recipes = sorted((Path(CONFIGS) / "experiment").glob("*.yaml"))
    jobs = {}
    for recipe in recipes:
        asked = of_recipe(read_kept(arguments.results / f"{recipe.stem}.jsonl")[0], recipe)
        jobs[recipe.stem] = as_configured(asked, recipe)
        if count := len(asked) - len(jobs[recipe.stem]):
            print(f"{recipe.stem}: {count} jobs left out, which ran with another configuration")
    sections = [INTRODUCTION]
    if (path := arguments.results / "goals.yaml").exists():
        entries: Any = OmegaConf.to_container(OmegaConf.load(path))
        goals = [Goal(**entry) for entry in entries]
        sections.append("\n".join(goals_table(goals, jobs)))
    run = [recipe for recipe in recipes if jobs[recipe.stem]]
    sections += [section(jobs[recipe.stem], recipe, arguments.results) for recipe in run]
    if missing := missing_table(recipes, jobs):
        sections.append("\n".join(missing))
    write_whole(arguments.page, "\n\n".join(sections) + "\n")
    print(f"{arguments.page}: {len(run)} tables")
