"""RESULTS.md from kept results: ``python -m experiments.results``.

Every recipe leaves a folder of jobs under ``results/``; of each job ``results.json`` is kept.
This rebuilds the page and its pictures from them, and nothing on it is written by hand but the
texts of :data:`RECIPES`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from experiments.report import read_jobs, sweep_table
from experiments.run import CONFIGS

INTRODUCTION = """\
# Results

Average test accuracy over all tasks after the last one, and forgetting, in per cent: mean ±
standard error over the seeds. Published figures stand in the last column; they are of other
seeds, and where said of other settings. Written by `python -m experiments.results` from the
`results.json` of every job under `results/`; to run a table again, use the command above it
(`EWC_DATA` names the folder of MNIST).
"""


def published_of(recipe: Path) -> dict[str, str]:
    """The published figures that a recipe's configuration holds."""
    config: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    report = config.get("hydra", {}).get("callbacks", {}).get("report", {})
    return {str(key): str(value) for key, value in report.get("published", {}).items()}


def title_of(recipe: Path) -> str:
    """The first comment of a recipe: what it runs."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(
        line.removeprefix("# ") for line in lines if line.startswith("# ") and "@" not in line
    )


def section(folder: Path, recipe: Path, pictures: Path) -> str:
    """The heading, the command, the table and the pictures of one recipe."""
    jobs = read_jobs(folder)
    columns, rows = sweep_table(jobs, published_of(recipe))
    lines = [
        f"## {folder.name}",
        "",
        title_of(recipe),
        "",
        f"```\npython -m experiments.run experiment={folder.name}\n```",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    if picture := draw_over_tasks(jobs, folder.name, pictures):
        lines += ["", f"![accuracy over tasks]({picture.parent.name}/{picture.name})"]
    versions = jobs[0]["versions"]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."]
    return "\n".join(lines)


def draw_over_tasks(jobs: Sequence[Mapping[str, Any]], name: str, folder: Path) -> Path | None:
    """Average accuracy over the tasks so far, a line for every setting."""
    lines: dict[str, list[list[float]]] = {}
    for job in jobs:
        settings = [o for o in job["overrides"] if re.match(r"(strategy|fisher|benchmark)", o)]
        label = ", ".join(o.partition("=")[2] for o in settings if not o.startswith("seed"))
        matrix = job["accuracy_matrix"]
        lines.setdefault(label, []).append(
            [100 * sum(row[: i + 1]) / (i + 1) for i, row in enumerate(matrix)]
        )
    if not lines:
        return None
    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot()
    for label, runs in lines.items():
        mean = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, marker=".", label=label)
    axes.set(xlabel="tasks learnt", ylabel="average accuracy in %", title=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--page", type=Path, default=Path("RESULTS.md"))
    arguments = parser.parse_args()
    sections = [INTRODUCTION]
    for recipe in sorted((Path(CONFIGS) / "experiment").glob("*.yaml")):
        folder = arguments.results / recipe.stem
        if read_jobs(folder):
            sections.append(section(folder, recipe, arguments.results))
    arguments.page.write_text("\n\n".join(sections).rstrip() + "\n", encoding="utf-8")
    print(f"{arguments.page}: {len(sections) - 1} tables")


if __name__ == "__main__":
    main()
