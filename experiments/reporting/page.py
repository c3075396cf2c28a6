"""RESULTS.md from kept results: ``python -m experiments.results``.

Every recipe leaves a folder of jobs under ``results/``; of each job ``results.json`` is kept.
This rebuilds the page and its pictures from them.  Figures are never written by hand; the
titles and published values are those of the recipes, the bars and what is said of them
those of ``results/bars.yaml``.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import ConfigurationError, plain, same_outcome
from experiments.reporting.pictures import OF_SWEEPS, Jobs
from experiments.reporting.sweep import (
    finished,
    has_options,
    markdown,
    mean_and_error,
    means_by_strength,
    options_of,
    read_jobs,
    strength_of,
    sweep_table,
)

INTRODUCTION = """\
# Results

Average test accuracy over all tasks after the last one, and forgetting, in per cent: mean ±
standard error over the seeds, without an error one seed. Published figures are of other seeds,
and where said of other settings. Seconds are what a job took on a machine that did other things
beside it, not what a method costs. Written by `python -m experiments.results` from the
`results.json` of every job under `results/`. The command above a table runs what is missing of
it (`EWC_DATA` names the folder of MNIST); to run all of it again, remove its folder first."""


def report_of(recipe: Path) -> dict[str, Any]:
    """What a recipe says of its report: published figures and pictures."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    found: dict[str, Any] = config.get("hydra", {}).get("callbacks", {}).get("report", {})
    return found


def title_of(recipe: Path) -> str:
    """The first comment of a recipe: what it runs."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(
        line.removeprefix("# ") for line in lines if line.startswith("# ") and "@" not in line
    )


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
    if not done:  # all diverged: there is nothing to draw
        return "\n".join(lines)
    for name in report.get("pictures", ["over_tasks"]):
        if name not in OF_SWEEPS:
            raise ConfigurationError(
                f"{recipe}: {name!r} is no picture: allowed are {', '.join(OF_SWEEPS)}."
            )
        figure = OF_SWEEPS[name](done, recipe.stem)
        path = pictures / f"{recipe.stem}_{name}.png"
        figure.savefig(path, dpi=110)
        lines += ["", f"![{name.replace('_', ' ')}]({pictures.name}/{path.name})"]
    versions: dict[str, dict[str, None]] = {}
    for job in done:
        for name, version in job["versions"].items():
            versions.setdefault(name, {})[version] = None
    named = (f"{name} {' and '.join(found)}" for name, found in versions.items())
    lines += ["", f"Versions: {', '.join(named)}."]
    return "\n".join(lines)


def bars_table(bars: list[dict[str, Any]], jobs: Mapping[str, Jobs]) -> list[str]:
    """The bars, what was measured for each, and whether it is met.

    Args:
        bars: ``name``, ``published``, ``bar``, ``recipe``, ``settings`` of the jobs that count,
            optionally a ``remark`` each; without a ``bar`` the value is only shown.  The
            value is the mean accuracy, at least the bar; with ``decades: true`` the decades
            of strength within a point of the best, at least the bar; with ``default`` the
            points by which this strength is under the best one, each over the seeds that both
            have, at most the bar, and no verdict where it is the smallest or largest one.
        jobs: the results by recipe.
    """
    rows = []
    for bar in bars:
        members = [
            job
            for job in finished(jobs.get(bar["recipe"], []))
            if has_options(options_of(job), bar["settings"])
        ]
        value, shown = measured(bar, members)
        verdict = ""
        if value is not None and "bar" in bar:
            met = value <= bar["bar"] if "default" in bar else value >= bar["bar"]
            verdict = "yes" if met else "no"
        limits = str(bar.get("bar", "")), shown, verdict, bar.get("remark", "")
        rows.append([bar["name"], str(bar.get("published", "")), *limits])
    return markdown(["benchmark", "published", "bar", "measured", "met", "remark"], rows)


def measured(bar: Mapping[str, Any], jobs: Jobs) -> tuple[float | None, str]:
    """The value that a bar is about, and how the table shows it; ``None`` without a value."""
    if not jobs:
        return None, "not run"
    if bar.get("decades"):
        value = decades_within(jobs, 1.0)
        return value, f"{value:g} (strengths in steps of ten)"
    if "default" in bar:
        leads = leads_over(jobs, bar["default"])
        if not leads:
            return None, "not run"
        best = max(leads.values(), key=statistics.fmean)
        shown = (
            f"{mean_and_error(best)} under the best of {len(leads)} strengths "
            f"({min(leads):g} to {max(leads):g}, {_number_of_seeds(best)})"
        )
        # Where the default is the smallest or largest there is, the best may lie beyond.
        inside = min(leads) < bar["default"] < max(leads)
        return statistics.fmean(best) if inside else None, shown
    value = statistics.fmean(100 * job["average_accuracy"] for job in jobs)
    return value, f"{value:.2f} ({_number_of_seeds(jobs)})"


def _number_of_seeds(of: Sequence[Any]) -> str:
    return f"{len(of)} seed{'s' * (len(of) > 1)}"


def leads_over(jobs: Jobs, default: float) -> dict[float, list[float]]:
    """By how many points every strength is over a default one, on each seed that both have."""
    found: dict[float, dict[int, float]] = {}
    for job in jobs:
        found.setdefault(strength_of(job), {})[job["seed"]] = 100 * job["average_accuracy"]
    reference = found.get(default, {})
    return {
        strength: [by_seed[seed] - reference[seed] for seed in common]
        for strength, by_seed in sorted(found.items())
        if (common := sorted(by_seed.keys() & reference.keys()))
    }


def kept_table(recipes: Sequence[Path], jobs: Mapping[str, Jobs]) -> list[str]:
    """How many jobs of every sweep are kept, how many it has, and values without any."""
    rows = []
    for recipe in recipes:
        if swept := swept_by(recipe):
            size = math.prod(len(values) for values in swept.values())
            given = [options_of(job) for job in jobs[recipe.stem]]
            without = [
                f"{name}={value}"
                for name, values in swept.items()
                for value in values
                if name != "seed" and not any(has_options(own, {name: value}) for own in given)
            ]
            rows.append([recipe.stem, str(len(given)), str(size), ", ".join(without)])
    why = "What is missing has not been run, for want of time; its recipe's command runs it."
    columns = ["recipe", "jobs kept", "jobs in all", "without any job"]
    return ["## What is kept", "", why, "", *markdown(columns, rows)]


def decades_within(jobs: Jobs, points: float) -> float:
    """The longest run of strengths, in decades, whose mean is within ``points`` of the best.

    A strength without result, a factor of more than ten from its neighbours, ends a run.
    """
    means = means_by_strength(jobs)
    best = max(means.values())
    longest, first, last = 0.0, 0.0, 0.0
    for strength, mean in means.items():
        if mean < best - points:
            last = 0.0
            continue
        if strength > 10.001 * last:
            first = strength
        last = strength
        longest = max(longest, math.log10(strength / first))
    return round(longest, 1)


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


def swept_by(recipe: Path) -> dict[str, list[str]]:
    """The options that a recipe varies, and their values; none if it is a single run."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    swept = config.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {name: str(values).split(",") for name, values in swept.items()}


def kept_apart() -> list[str]:
    """The options that say where and how a job runs, not what it is."""
    config: Any = OmegaConf.load(Path(CONFIGS) / "sweep" / "kept.yaml")
    names: list[str] = list(config.hydra.job.config.override_dirname.exclude_keys)
    return names


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--page", type=Path, default=Path("RESULTS.md"))
    arguments = parser.parse_args()
    recipes = sorted((Path(CONFIGS) / "experiment").glob("*.yaml"))
    jobs = {}
    for recipe in recipes:
        asked = of_recipe(read_jobs(arguments.results / recipe.stem), recipe)
        jobs[recipe.stem] = as_configured(asked, recipe)
        if others := len(asked) - len(jobs[recipe.stem]):
            print(f"{recipe.stem}: {others} jobs left out, which ran with another configuration")
    parts = [INTRODUCTION]
    if (path := arguments.results / "bars.yaml").exists():
        bars: Any = OmegaConf.to_container(OmegaConf.load(path))
        parts.append("\n".join(bars_table(bars, jobs)))
    run = [recipe for recipe in recipes if jobs[recipe.stem]]
    parts += [section(jobs[recipe.stem], recipe, arguments.results) for recipe in run]
    parts.append("\n".join(kept_table(recipes, jobs)))
    arguments.page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{arguments.page}: {len(run)} tables")
