"""A report over any set of runs: ``python -m experiments.report DIR [DIR ...]``."""

import argparse
import os
import sys
from pathlib import Path

from experiments.configuration.command_line import sentence
from experiments.reporting.report.page import PAGE, write_report
from experiments.reporting.sweep_report import report_sweep


def main() -> None:
    """Write the report, and ``report.md`` again where the one place is a sweep's folder."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="A report over finished runs: report.html, pictures and CSV files.",
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR",
        help="a run directory, a sweep, a folder of them, or a file of kept results",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path,
        help="the folder of the report; default: the one DIR itself, report/ for several",
    )  # fmt: skip
    arguments = parser.parse_args()
    places: list[Path] = arguments.places
    for place in places:
        if not place.exists():
            sys.exit(f"error: {place} does not exist: DIR is a folder with finished runs.")
        if place.is_file() and place.suffix != ".jsonl":
            sys.exit(
                f"error: {place} is a file: DIR is a folder with finished runs, or a file of kept "
                "results, results/RECIPE.jsonl."
            )
    output: Path = arguments.output or (
        places[0] if len(places) == 1 and places[0].is_dir() else Path("report")
    )
    try:
        count = write_report(places, output)
        if count and len(places) == 1 and places[0].is_dir() and not arguments.output:
            report_sweep(places[0])
    except OSError as error:
        sys.exit(f"error: {sentence(error)}; --output=DIR chooses another folder.")
    if not count:
        named = ", ".join(map(str, places))
        sys.exit(f"error: there is no finished run in {named}: a run leaves a results.json.")
    print(f"{count} run{'s' * (count > 1)}: {os.path.relpath(output / PAGE)}")


if __name__ == "__main__":
    main()
