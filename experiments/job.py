"""One run of an experiment, as the command line or a sweep asks for it."""

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.configuration.command_line import (
    CONFIGS,
    ended_briefly,
    flags_first,
    flags_of,
    remove_empty,
    sentence,
)
from experiments.configuration.manual import asks_for_manual, print_manual
from experiments.configuration.schema import build, plain
from experiments.configuration.targets import ConfigurationError

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
def run(config: DictConfig) -> float:
    """Run one experiment; the result is its average accuracy, which a sweeper maximises.

    A job of a sweep that fails or diverges gives NaN.  The sweep continues, and its report names
    the job.
    """
    from experiments.training.stop import in_job

    job = HydraConfig.get()
    directory = Path(job.runtime.output_dir)
    single = job.mode == RunMode.RUN
    try:
        with in_job():
            return _run(plain(config), directory, single)
    except (ConfigurationError, FloatingPointError) as error:
        reason = sentence(error)
    except OSError as error:
        reason = sentence(error)
        if not error.filename or Path(error.filename).is_relative_to(directory):
            option = "hydra.run.dir" if single else "hydra.sweep.dir"
            reason += f"; {option}=DIR chooses another folder than {directory}."
    except Exception as error:
        from ewc.linalg.devices import out_of_memory

        if out_of_memory(error):
            reason = f"memory is exhausted: {sentence(error)}"
        elif single:
            raise
        else:
            _log.exception("The job failed.")
            reason = f"{type(error).__name__}: {sentence(error)}"
    finally:
        remove_empty(directory)
    if single:
        sys.exit(f"error: {reason}")
    from experiments.recording.sweep import note_failure

    _log.error("%s", reason)
    sweep = Path(job.runtime.cwd) / job.sweep.dir
    note_failure(sweep, job.job.num, job.overrides.task, reason)
    return math.nan


def _run(config: dict[str, Any], directory: Path, single: bool) -> float:
    from experiments.recording import folder
    from experiments.recording.kept import keep, kept_job
    from experiments.training.stop import Stop

    Stop().check()  # the worker of a sweep that has died starts no further job
    # A sweep continues where it stopped.
    kept = _kept_in()
    if kept and (done := kept_job(kept, config)):
        return _done(done, kept)
    if done := folder.finished(directory, config):
        _note(directory)
        if kept:  # the process may have died before it kept the line
            keep(kept, done)
        return _done(done, directory)
    # A slow import, which neither a wrong option nor a finished job needs.
    from experiments.experiment import Experiment
    from experiments.training.device import take_device

    if _runs_beside_others():
        take_device(HydraConfig.get().job.num)
    experiment = build(config, Experiment)
    try:
        prepared = experiment.prepare()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
    overrides = list(HydraConfig.get().overrides.task)
    with folder.owned(directory, config, overrides) as done, _logged(directory / "run.log"):
        _note(directory)
        if done:  # by another process meanwhile
            return _done(done, directory)
        try:
            return _trained(prepared, config, directory)
        except FloatingPointError as error:
            # The records of a diverged run stay, as they show how it diverged.
            if single:
                raise
            _log.error("diverged: %s", error)
            # A sweep keeps that the job has run, and how it ended.
            job = {"seed": experiment.seed, "config": config, "overrides": overrides}
            job["flags"] = flags_of(HydraConfig.get())
            _keep(directory, {"diverged": str(error), **job})
            return math.nan


def _note(directory: Path) -> None:
    """Note that a folder is that of a job of the sweep, now that the job has it."""
    from experiments.recording.sweep import note_job

    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        note_job(Path(job.runtime.cwd) / job.sweep.dir, directory)


def _done(results: dict[str, Any], place: Path) -> float:
    """The accuracy of a job that has ended before; NaN if it diverged."""
    _log.info("already done: %s", os.path.relpath(place))
    return float(results.get("average_accuracy", math.nan))


def _trained(prepared: Any, config: dict[str, Any], directory: Path) -> float:
    """Run an experiment from its newest checkpoint, or from the start."""
    from experiments.recording.checkpoints import Checkpoints
    from experiments.recording.continued import command_to_continue
    from experiments.training.resume import Continuation
    from experiments.training.stop import Stop

    checkpoints = Checkpoints(directory, config, prepared.deciding_versions)
    state, command = checkpoints.newest(), command_to_continue(directory, HydraConfig.get())
    with Stop() as stop:
        continuation = Continuation(checkpoints, state, stop, command)
        average = _train(prepared, config, directory, continuation)
        if stop.asked():
            assert stop.signal
            in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
            more = f"; to continue the sweep: {command}" if in_sweep else ""
            _log.warning("%s: stopped after the end of a run%s.", stop.signal.name, more)
            stop.check()
    return average


def _train(prepared: Any, config: dict[str, Any], directory: Path, continuation: Any) -> float:
    """Train, save its results, then the pictures and tables made from them."""
    from rich.console import Console

    from experiments.recording.files import only_warned, write_whole
    from experiments.recording.folder import PICTURES
    from experiments.recording.label import label_of
    from experiments.recording.tracking import Recorder
    from experiments.reporting import run_pictures, run_report
    from experiments.reporting.heat_map import heat_map
    from experiments.reporting.remarks import remarks

    job, experiment = HydraConfig.get(), prepared.experiment
    choices, scenario = job.runtime.choices, experiment.benchmark.scenario
    named = {group: choices[group] for group in ("benchmark", "model", "strategy")}
    title = f"{choices['benchmark']} ({scenario}), {choices['strategy']}"
    sweep = Path(job.runtime.cwd) / job.sweep.dir if job.mode == RunMode.MULTIRUN else None
    label = label_of(choices, list(job.overrides.task), experiment.seed, sweep, flags_of(job))
    recorded = continuation.state["recorder"] if continuation.state else None
    with Recorder(directory, experiment.wandb, config, label, state=recorded) as recorder:
        # The bars of jobs that run at the same time would overwrite each other.
        console = Console(stderr=True, force_terminal=False if _runs_beside_others() else None)
        results = prepared.run(recorder, console, _log, continuation)
        results |= {"config": config, "overrides": list(job.overrides.task)}
        results |= {"flags": flags_of(job), "choices": named, "penalty_pull": recorder.curve.pull}
        results["remarks"] = remarks(results)
        _keep(directory, results)
        matrix = results["accuracy_matrix"]
        with only_warned("config.yaml"):
            text = OmegaConf.to_yaml(OmegaConf.create(config))
            write_whole(directory / "config.yaml", text)
        for picture in PICTURES:
            path = directory / f"{picture}.png"
            with only_warned(path.name):
                if picture == "accuracy_matrix":
                    run_pictures.draw_accuracy_matrix(matrix, title, path)
                else:
                    run_pictures.draw_learning_curves(matrix, recorder.curve, title, path)
                recorder.picture(picture, path)
        recorder.page("accuracy_heat_map", heat_map(matrix, title))
        recorder.table("accuracy", *run_report.accuracy_table(matrix))
        columns, rows = run_report.spectrum_table(results["fisher"])
        if rows:
            recorder.table("fisher_spectrum", columns, rows)
        final = ("average_accuracy", "forgetting", "backward_transfer")
        recorder.summary({key: results[key] for key in final})
    console = Console()
    run_report.show_results(results, title, console)
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


def _keep(directory: Path, results: dict[str, Any]) -> None:
    """Write the results, or print them if that fails: there is no other copy."""
    from experiments.recording.kept import keep
    from experiments.recording.results import write_results

    try:
        write_results(directory, results)
    except OSError:
        _log.warning("The results cannot be written, so they follow here.")
        print(json.dumps(results))
        raise
    if kept := _kept_in():
        keep(kept, results)


def _runs_beside_others() -> bool:
    """Whether this is a job of a sweep whose launcher runs several jobs at a time."""
    job = HydraConfig.get()
    alone = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    return job.mode == RunMode.MULTIRUN and job.launcher._target_ != alone


def _kept_in() -> Path | None:
    """The file with the kept results of the sweep's jobs, if the sweep has one."""
    from experiments.recording.kept import varied_by

    job: Any = HydraConfig.get()  # a container, whatever its annotation says
    kept = OmegaConf.select(job, "callbacks.report.kept")
    if job.mode != RunMode.MULTIRUN or not kept or varied_by(job):
        return None
    return Path(job.runtime.cwd) / str(kept)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Log to a file too, in Hydra's format; Hydra itself would open the file too early.

    Warnings are logged as one line each, without the code that gave them.
    """
    from experiments.recording.files import LogFile

    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.getLogger().addHandler(handler)
    # W&B has log files too, and a full disk would print a traceback for each of its lines.
    prints, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _log.warning("%s", message)
            yield
    finally:
        logging.raiseExceptions = prints
        logging.getLogger().removeHandler(handler)
        handler.close()


def command() -> None:
    """Run the command line; a wrong option gives a short message, not a traceback."""
    if asks_for_manual(sys.argv[1:]):
        print_manual(Path(CONFIGS), sys.argv[1:])
        return
    sys.argv[1:] = flags_first(sys.argv[1:])
    os.environ["MPLBACKEND"] = "agg"  # pictures go into files, whatever the user's screen
    ended_briefly(_resumed_or_new, "config")


def _resumed_or_new() -> None:
    if any(argument.startswith("resume=") for argument in sys.argv):
        from experiments.recording.continued import with_resume

        sys.argv[1:] = with_resume(sys.argv[1:])
    try:
        run()
    except BrokenExecutor:  # joblib's
        from experiments.training.stop import AtOnce

        sys.exit(
            f"error: the process of a job was killed, as when memory is exhausted; {AtOnce.advice}"
        )
