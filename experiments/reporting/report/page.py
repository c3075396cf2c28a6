"""The report as files: one page, the pictures as PNG files, and the tables as CSV files."""

import csv
import io
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from experiments.recording.files import write_whole
from experiments.recording.folder import PICTURES
from experiments.reporting.remarks import remarks
from experiments.reporting.report.gathering import Gathered, Run, gather
from experiments.reporting.report.measures import (
    Estimate,
    Ranking,
    Row,
    compared,
    cost_to_new_tasks,
    gain_before_training,
    ranked,
    summary,
)
from experiments.reporting.report.pictures import left_out, pictures_of
from experiments.reporting.report.settings import by_benchmark
from experiments.reporting.report.svg import drawn_for_a_page
from experiments.reporting.tables import seeds_of, versions_of

PAGE = "report.html"

COLUMNS = {
    "accuracy": ("accuracy", "%"),
    "forgetting": ("forgetting", "points"),
    "intransigence": ("intransigence", "points"),
    "forward_transfer": ("forward transfer", "points"),
    "seconds": ("time", "s"),
    "memory": ("memory", "MB"),
}
"""The measures of a setting, with their names and units on the page."""


def write_report(places: Iterable[Path], output: Path) -> int:
    """Write ``report.html``, ``settings.csv``, ``runs.csv`` and the pictures over all runs.

    Args:
        places: run directories, folders of them at any depth, or files of kept results.
        output: the folder of the report; it is made if it is missing.

    Returns:
        The number of runs; without runs nothing is written.

    Raises:
        OSError: a file cannot be written.
    """
    gathered = gather(places)
    if not gathered.runs:
        return 0
    rankings = [ranked(benchmark) for benchmark in by_benchmark(gathered.runs)]
    sections: list[dict[str, Any]] = []
    drawings: dict[str, bytes] = {}
    with drawn_for_a_page():
        for number, ranking in enumerate(rankings, start=1):
            drawn = pictures_of(ranking, f"benchmark{number}")
            drawings |= {f"{picture.name}.png": picture.png() for picture in drawn}
            sections.append(_section(ranking, output) | _pictures(drawn, ranking))
    files = {
        "settings.csv": _csv(_setting_records(rankings)),
        "runs.csv": _csv(_run_records(rankings, output)),
        PAGE: _rendered(gathered, sections),
    }
    # Nothing is written before everything is made.
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for earlier in pictures.glob("benchmark*.png"):
        if earlier.name not in drawings:
            earlier.unlink()
    for name, content in drawings.items():
        write_whole(pictures / name, content)
    for name, text in files.items():
        write_whole(output / name, text)
    return len(gathered.runs)


def _rendered(gathered: Gathered, sections: Sequence[Mapping[str, Any]]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    diverged = sum("diverged" in run.results for run in gathered.runs)
    return environment.get_template("page.html").render(
        title=sections[0]["name"] if len(sections) == 1 else f"{len(sections)} benchmarks",
        counts=_counts(gathered, diverged),
        sections=sections,
        failed=gathered.failed,
        damaged=gathered.damaged,
        versions=versions_of([run.results for run in gathered.runs]),
    )


def _counts(gathered: Gathered, diverged: int) -> str:
    parts = [f"{len(gathered.runs)} run{'s' * (len(gathered.runs) != 1)}"]
    parts += [f"{diverged} diverged"] * bool(diverged)
    parts += [f"{len(gathered.failed)} failed"] * bool(gathered.failed)
    parts += [f"{len(gathered.damaged)} damaged"] * bool(gathered.damaged)
    return ", ".join(parts)


def _section(ranking: Ranking, output: Path) -> dict[str, Any]:
    """What the page says on one benchmark, besides the pictures."""
    columns = [key for key in COLUMNS if any(getattr(row, key) for row in ranking.rows)]
    return {
        "name": ranking.name,
        "summary": summary(ranking),
        "reference": ranking.reference if "intransigence" in columns else "",
        "columns": [{"name": COLUMNS[key][0], "unit": COLUMNS[key][1]} for key in columns],
        "rows": [_cells(row, columns, output) for row in ranking.rows],
        "best": next((row.setting.name for row in compared(ranking)), ""),
        "remarks": _remarks(ranking),
    }


def _cells(row: Row, columns: Sequence[str], output: Path) -> dict[str, Any]:
    """A row of the table: text to read, and a number to sort by."""
    diverged = sum("diverged" in run.results for run in row.setting.runs)
    cells = []
    for key in columns:
        estimate: Estimate | None = getattr(row, key)
        text = estimate.text(0 if key == "memory" else 1) if estimate else ""
        if key == "accuracy" and diverged:
            text = f"{text} ({diverged} diverged)" if estimate else "diverged"
        cells.append({"text": text, "sort": estimate.mean if estimate else ""})
    return {
        "name": row.setting.name,
        "seeds": seeds_of([run.results for run in row.setting.runs]),
        "cells": cells,
        "runs": [_run(run, output) for run in row.setting.runs],
        "reference": row.setting.reference,
    }


def _run(run: Run, output: Path) -> dict[str, Any]:
    """A run's links, from the folder of the report, and its command."""
    links = []
    if run.folder:
        names = ["results.json", *(f"{name}.png" for name in PICTURES), "run.log"]
        links = [
            {
                "name": name.partition(".")[0].replace("_", " "),
                "url": _url(run.folder / name, output),
            }
            for name in names
            if (run.folder / name).exists()
        ]
    results = run.results
    return {
        "seed": results["seed"],
        "folder": os.path.relpath(run.folder, output) if run.folder else "",
        "url": _url(run.folder, output) + "/" if run.folder else "",
        "links": links,
        "command": command_of(results),
        "accuracy": f"{100 * results['average_accuracy']:.2f} %"
        if "average_accuracy" in results
        else "diverged",
    }


def _url(path: Path, output: Path) -> str:
    """The address of a file from the folder of the report; names may have any character."""
    return quote(os.path.relpath(path, output))


def command_of(results: Mapping[str, Any]) -> str:
    """The command line that runs a job again, alone."""
    words = [*results.get("flags", []), *results["overrides"]]
    return shlex.join(["python", "-m", "experiments.run", *words])


def _remarks(ranking: Ranking) -> list[dict[str, str]]:
    """What went wrong in the runs: each sentence once, with the runs that it is about."""
    said: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in ranking.rows:
        for run in row.setting.runs:
            results = run.results
            sentences = [f"Diverged: {results['diverged']}"] if "diverged" in results else []
            for sentence in sentences or results.get("remarks", remarks(results)):
                said[sentence][row.setting.name].append(results["seed"])
    return [
        {
            "sentence": sentence,
            "runs": "; ".join(
                f"{name} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
                for name, seeds in settings.items()
            ),
        }
        for sentence, settings in said.items()
    ]


def _pictures(drawn: Sequence[Any], ranking: Ranking) -> dict[str, Any]:
    shown = [
        {
            "svg": picture.svg(),
            "title": picture.title,
            "text": picture.text,
            "png": f"pictures/{picture.name}.png",
            "is_matrix": "_matrix_" in picture.name,
        }
        for picture in drawn
    ]
    return {
        "pictures": [picture for picture in shown if not picture["is_matrix"]],
        "matrices": [picture for picture in shown if picture["is_matrix"]],
        "left_out": left_out(ranking),
    }


def _setting_records(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """A record for each row of the tables."""
    records = []
    for ranking in rankings:
        for rank, row in enumerate(ranking.rows, start=1):
            record: dict[str, Any] = {
                "benchmark": ranking.name,
                "rank": rank,
                "setting": row.setting.name,
                "seeds": " ".join(map(str, row.setting.seeds)),
            }
            for key, (_, unit) in COLUMNS.items():
                estimate: Estimate | None = getattr(row, key)
                record[f"{key} ({unit})"] = _blank(estimate.mean if estimate else None)
                record[f"{key} standard error"] = _blank(estimate.error if estimate else None)
            records.append(record)
    return records


def _run_records(rankings: Sequence[Ranking], output: Path) -> list[dict[str, Any]]:
    """A record for each run."""
    records = []
    for ranking in rankings:
        for row in ranking.rows:
            for run in row.setting.runs:
                results = run.results
                has = "diverged" not in results
                records.append(
                    {
                        "benchmark": ranking.name,
                        "setting": row.setting.name,
                        "seed": results["seed"],
                        "folder": _run(run, output)["folder"],
                        "diverged": results.get("diverged", ""),
                        "average_accuracy": results.get("average_accuracy", ""),
                        "forgetting": results.get("forgetting", ""),
                        "backward_transfer": results.get("backward_transfer", ""),
                        "intransigence": _blank(
                            cost_to_new_tasks(results, ranking.matrices) if has else None
                        ),
                        "forward_transfer": _blank(gain_before_training(results) if has else None),
                        **{
                            f"seconds_{part}": results.get("seconds", {}).get(part, "")
                            for part in ("train", "fisher", "eval", "total")
                        },
                        "memory_bytes": results.get("memory", {}).get("peak", ""),
                        "command": command_of(results),
                    }
                )
    return records


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
