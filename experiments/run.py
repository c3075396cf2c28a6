"""The command line: ``python -m experiments.run [option=value ...]``."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.schema import ConfigurationError, build, plain, same_outcome

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
def run(config: DictConfig) -> float:
    """Run one experiment; its average accuracy is what a sweeper maximises."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        return _run(plain(config), directory)
    except (ConfigurationError, FloatingPointError) as error:
        # A run that diverged keeps its records, for they show how.
        if isinstance(error, ConfigurationError):
            _remove_traces(directory)
        # A sweep must hear of it as an exception, and go on with its other jobs.
        if single:
            sys.exit(f"error: {error}")
        raise


def _run(config: dict[str, Any], directory: Path) -> float:
    # Slow to import, and not needed to find a wrong option on the command line.
    from rich.console import Console

    from experiments import report
    from experiments.experiment import Experiment
    from experiments.tracking import Recorder

    if (done := report.read_results(directory)) and same_outcome(done["config"], config):
        # A sweep into the same folder goes on where it stopped.
        _log.info("already done: %s", os.path.relpath(directory))
        return float(done["average_accuracy"])
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
        pictures = {n: directory / f"{n}.png" for n in ("accuracy_matrix", "learning_curves")}
        report.draw_accuracy_matrix(matrix, title, pictures["accuracy_matrix"])
        report.draw_learning_curves(matrix, _steps(directory), title, pictures["learning_curves"])
        for picture, path in pictures.items():
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


def _steps(directory: Path) -> list[dict[str, float]]:
    """The recorded training steps."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def _remove_traces(directory: Path) -> None:
    """Take away what Hydra wrote for this run, and folders that are then empty.

    Nothing else: the directory may be the user's own, or hold an earlier run.
    """
    for name in ("config", "hydra", "overrides"):
        (directory / ".hydra" / f"{name}.yaml").unlink(missing_ok=True)
    for log in directory.glob("*.log"):
        if log.stat().st_size == 0:
            log.unlink()
    for folder in (directory / ".hydra", directory, *list(directory.parents)[:2]):
        try:
            folder.rmdir()
        except OSError:
            return


def short_message(error: Exception) -> str:
    """One sentence or two for a wrong command line: the option, and what is allowed."""
    text = str(error)
    if unknown := re.match(r"Could not override '([^']+)'", text):
        option = unknown[1]
        return f"Unknown option {option!r}: allowed are {_allowed(option)}."
    if choice := re.search(
        r"Could not find '([^']+)'\s+Available options in.*?:\n(.*?)\n\S", text, re.S
    ):
        return f"Could not find {str(choice[1])!r}: allowed are {', '.join(choice[2].split())}."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])


def _allowed(option: str) -> str:
    """The options beside an unknown one, as the command line would have had them."""
    overrides = [o for o in sys.argv[1:] if re.match(r"[\w/@+~]+=[\w/]+$", o)]
    parent, _, _ = option.rpartition(".")
    for kept in (overrides, []):
        try:
            with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
                node = OmegaConf.select(hydra.compose("config", overrides=kept), parent or "")
        except (HydraException, OmegaConfBaseException):
            continue
        if isinstance(node, DictConfig):
            names = [str(k) for k in node if not str(k).startswith("_")]
            if not parent:
                return ", ".join([*names, "experiment", "sweep"])
            return ", ".join(f"{parent}.{name}" for name in names)
        break
    return f"none, {parent!r} is a value"


def main() -> None:
    """Run the command line; a wrong option ends in one short message, not in a traceback."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        run()
        return
    # Hydra then raises instead of printing a traceback itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        run()
    except (
        ConfigurationError,
        FloatingPointError,
        HydraException,
        OmegaConfBaseException,
    ) as error:
        sys.exit(f"error: {short_message(error)}")


if __name__ == "__main__":
    main()
