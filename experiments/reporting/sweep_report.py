"""The report over the jobs of a sweep."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.recording.continued import command_to_continue
from experiments.recording.files import only_warned, write_whole
from experiments.recording.kept import read_kept, varied_by
from experiments.recording.results import read_sweep
from experiments.recording.sweep import FAILURES, begin_sweep, failures
from experiments.reporting.tables import markdown, sweep_table
from experiments.training.stop import AtOnce


class SweepReport(Callback):
    """Writes ``report.md`` and ``report.html`` at the end of a sweep, and prints the first.

    Args:
        published: published accuracies in per cent of some rows, by the row's settings as on the
            command line: ``strategy=ewc`` or ``benchmark.scenario=task,strategy=ewc``.
        pictures: the pictures in RESULTS.md, names of functions in
            :mod:`experiments.reporting.sweep_pictures`.
        kept: the file of kept results.  Its jobs are not run again, and the report is over all of
            them.
    """

    def __init__(
        self,
        published: Mapping[str, str] | None = None,
        pictures: Sequence[str] = (),
        kept: str | None = None,
    ) -> None:
        self.published = dict(published or {})
        self.pictures = list(pictures)
        self.kept = Path(kept) if kept else None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Begin the notes on the jobs, and say how the sweep is continued if a signal ends it."""
        hydra_config, folder = config.hydra, Path(config.hydra.sweep.dir)
        params = hydra_config.sweeper.get("params") or {}
        swept = [f"{key}={values}" for key, values in params.items()]
        begin_sweep(folder, [*swept, *hydra_config.overrides.task])
        if self.kept and varied_by(hydra_config):
            print(f"{self.kept} does not keep these jobs, as options vary the recipe.")
            self.kept = None
        AtOnce.advice = f"to continue the sweep: {command_to_continue(folder, hydra_config)}"

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write both reports, and end with an error if jobs failed.

        Raises:
            SystemExit: a job has failed.
        """
        # Imported here, as every run makes this callback, and few draw a report.
        from experiments.reporting.report.page import PAGE, write_report

        folder = Path(config.hydra.sweep.dir)
        with only_warned("report.md"):
            report_sweep(folder, self.published, self.kept)
        with only_warned(PAGE):
            if write_report([self.kept or folder], folder):
                print(f"report: {os.path.relpath(folder / PAGE)}")
        if failed := failures(folder):
            if len(failed) == 1:
                sys.exit(f"error: 1 job of the sweep failed: {failed[0]}")
            numbers = ", ".join(line.removeprefix("job ").partition(" ")[0] for line in failed)
            sys.exit(
                f"error: {len(failed)} jobs of the sweep failed, {numbers}: {failed[0]}; the "
                f"others are in {folder / FAILURES}"
            )


def report_sweep(
    folder: Path, published: Mapping[str, str] | None = None, kept: Path | None = None
) -> int:
    """Write ``report.md`` over the finished jobs of a sweep, and print it.

    Args:
        folder: the folder of the sweep.
        published: see :class:`SweepReport`.
        kept: see :class:`SweepReport`.

    Returns:
        The number of jobs; without jobs nothing is written.
    """
    jobs, damaged = read_kept(kept) if kept else read_sweep(folder)
    if not jobs:
        return 0
    columns, rows = sweep_table(jobs, published)
    text = "Accuracy and forgetting in %, mean ± standard error over the jobs of a row."
    lines = [text, "", *markdown(columns, rows), ""]
    if failed := failures(folder):
        lines += ["Without results, as they failed:", "", *(f"- {job}" for job in failed), ""]
    if damaged:
        lines += ["Left out:", "", *(f"- {job}" for job in damaged), ""]
    write_whole(folder / "report.md", "\n".join(lines))
    table = Table(title=f"{len(jobs)} jobs: {os.path.relpath(kept or folder)}")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return len(jobs)
