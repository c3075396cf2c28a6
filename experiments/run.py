"""The command line: ``python -m experiments.run [option=value ...]``."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CONFIGS, ended_briefly, remove_traces
from experiments.schema import ConfigurationError, build, plain, same_outcome

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
def run(config: DictConfig) -> float:
    """Run one experiment; its average accuracy is what a sweeper maximises.

    A job of a sweep that diverges has NaN, and a row in the sweep's report that says so.
    """
    directory = Path(HydraConfig.get().runtime.output_dir)
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        settings = plain(config)
        return _run(settings, directory)
    except ConfigurationError as error:
        remove_traces(directory)
        # A sweep must hear of it as an exception.
        if single:
            sys.exit(f"error: {error}")
        raise
    except FloatingPointError as error:
        # What a run that diverged has recorded stays, for it shows how.
        if single:
            sys.exit(f"error: {error}")
        _log.error("diverged: %s", error)
        _keep_diverged(directory, settings, str(error))
        return math.nan


def _run(config: dict[str, Any], directory: Path) -> float:
    # Slow to import, and not needed to find a wrong option on the command line.
    from rich.console import Console

    from experiments import pictures, report
    from experiments.experiment import Experiment
    from experiments.tracking import Recorder

    if (done := report.read_results(directory)) and same_outcome(done["config"], config):
        # A sweep into the same folder goes on where it stopped.
        _log.info("already done: %s", os.path.relpath(directory))
        return float(done.get("average_accuracy", math.nan))
    experiment = build(config)
    assert isinstance(experiment, Experiment)
    try:
        prepared = experiment.prepare()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigurationError(str(error)) from error

    job = HydraConfig.get()
    multirun = job.mode == RunMode.MULTIRUN
    choices = job.runtime.choices
    title = f"{choices['benchmark']} ({experiment.benchmark.scenario}), {choices['strategy']}"
    name = f"{choices['benchmark']}-{choices['strategy']}-seed{experiment.seed}"
    group = Path(job.sweep.dir).name if multirun else None
    with Recorder(directory, experiment.wandb, config, name, group) as recorder:
        results = prepared.run(recorder, Console(stderr=True), _log)
        results |= {"config": config, "overrides": list(job.overrides.task)}
        matrix = results["accuracy_matrix"]
        paths = {n: directory / f"{n}.png" for n in ("accuracy_matrix", "learning_curves")}
        pictures.draw_accuracy_matrix(matrix, title, paths["accuracy_matrix"])
        pictures.draw_learning_curves(matrix, _steps(directory), title, paths["learning_curves"])
        for picture, path in paths.items():
            recorder.picture(picture, path)
        recorder.table("accuracy", *report.accuracy_table(matrix))
        final = ("average_accuracy", "forgetting", "backward_transfer")
        recorder.summary({key: results[key] for key in final})
        OmegaConf.save(OmegaConf.create(config), directory / "config.yaml")
        report.write_results(directory / "results.json", results)
    console = Console()
    report.show_results(results, title, experiment.benchmark.scenario, console)
    seconds = ", ".join(f"{key} {value:.1f}" for key, value in results["seconds"].items())
    console.print(
        f"average accuracy {100 * results['average_accuracy']:.2f} %, forgetting "
        f"{100 * results['forgetting']:.2f} points; seconds: {seconds}",
        highlight=False,
        soft_wrap=True,
    )
    print(f"results: {os.path.relpath(directory)}")
    if recorder.sync_command:
        print(f"to upload the run to Weights & Biases: {recorder.sync_command}")
    return float(results["average_accuracy"])


def _keep_diverged(directory: Path, config: dict[str, Any], reason: str) -> None:
    """What a sweep keeps of a job without results: that it has run, and how it ended."""
    from experiments import report

    overrides = list(HydraConfig.get().overrides.task)
    job = {"diverged": reason, "seed": config["seed"], "config": config, "overrides": overrides}
    report.write_results(directory / "results.json", job)


def _steps(directory: Path) -> list[dict[str, float]]:
    """The recorded training steps."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def main() -> None:
    """Run the command line; a wrong option ends in one short message, not in a traceback."""
    ended_briefly(run, "config")


if __name__ == "__main__":
    main()
