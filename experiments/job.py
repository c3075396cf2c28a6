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
def accuracy_of_job(config: DictConfig) -> float:
    """The average accuracy of one job, which a sweeper maximises; the job runs if it has not.

    A job of a sweep that fails or diverges gives NaN.  The sweep continues, and its report names
    the job.
    """
    from experiments.training.stop import in_job

    hydra_config = HydraConfig.get()
    directory = Path(hydra_config.runtime.output_dir)
    sweep = _sweep_folder()
    try:
        with in_job():
            return _new_or_finished(plain(config), directory)
    except (ConfigurationError, FloatingPointError) as error:
        reason = sentence(error)
    except OSError as error:
        reason = sentence(error)
        if not error.filename or Path(error.filename).is_relative_to(directory):
            option = "hydra.sweep.dir" if sweep else "hydra.run.dir"
            reason += f"; {option}=DIR chooses another folder than {directory}."
    except Exception as error:
        from ewc.linalg.devices import out_of_memory

        if out_of_memory(error):
            reason = f"memory is exhausted: {sentence(error)}"
        elif not sweep:
            raise
        else:
            _log.exception("The job failed.")
            reason = f"{type(error).__name__}: {sentence(error)}"
    finally:
        remove_empty(directory)
    if not sweep:
        sys.exit(f"error: {reason}")
    from experiments.recording.sweep import note_failure

    _log.error("%s", reason)
    note_failure(sweep, hydra_config.job.num, hydra_config.overrides.task, reason)
    return math.nan


def _new_or_finished(config: dict[str, Any], directory: Path) -> float:
    """The accuracy of a job: of its results if there are any, else of a run now."""
    from experiments.recording import folder
    from experiments.recording.kept import keep, kept_job
    from experiments.training.stop import Stop

    Stop().check()  # the worker of a sweep that has died starts no further job
    # A sweep continues where it stopped.
    kept = _kept_file()
    if kept and (results := kept_job(kept, config)):
        return _accuracy_of_finished(results, kept)
    if results := folder.finished(directory, config):
        _note_in_sweep(directory)
        if kept:  # the process may have died before it kept the line
            keep(kept, results)
        return _accuracy_of_finished(results, directory)
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
    with folder.owned(directory, config, overrides) as results, _logged(directory / "run.log"):
        _note_in_sweep(directory)
        if results:  # of another process meanwhile
            return _accuracy_of_finished(results, directory)
        try:
            return _from_newest_checkpoint(prepared, config, directory)
        except FloatingPointError as error:
            # The records of a diverged run stay, as they show how it diverged.
            if not _sweep_folder():
                raise
            _log.error("diverged: %s", error)
            # A sweep keeps that the job has run, and how it ended.
            job = {"seed": experiment.seed, "config": config, "overrides": overrides}
            job["flags"] = flags_of(HydraConfig.get())
            _keep_results(directory, {"diverged": str(error), **job})
            return math.nan


def _sweep_folder() -> Path | None:
    """The folder of the sweep that the job is part of; ``None`` for a run alone."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.RUN:
        return None
    return Path(hydra_config.runtime.cwd) / hydra_config.sweep.dir


def _note_in_sweep(directory: Path) -> None:
    """Note that a folder is that of a job of the sweep, now that the job has it."""
    from experiments.recording.sweep import note_job

    if sweep := _sweep_folder():
        note_job(sweep, directory)


def _accuracy_of_finished(results: dict[str, Any], place: Path) -> float:
    """The accuracy of a job that has ended before; NaN if it diverged."""
    _log.info("already done: %s", os.path.relpath(place))
    return float(results.get("average_accuracy", math.nan))


def _from_newest_checkpoint(prepared: Any, config: dict[str, Any], directory: Path) -> float:
    """The accuracy of a run that begins at its newest checkpoint, or at the start without any."""
    from experiments.recording.checkpoints import Checkpoints
    from experiments.recording.continued import command_to_continue
    from experiments.training.resume import Continuation
    from experiments.training.stop import Stop

    checkpoints = Checkpoints(directory, config, prepared.deciding_versions)
    state, command = checkpoints.newest(), command_to_continue(directory, HydraConfig.get())
    with Stop() as stop:
        continuation = Continuation(checkpoints, state, stop, command)
        results = _trained_and_published(prepared, config, directory, continuation)
        if stop.asked():
            assert stop.signal
            more = f"; to continue the sweep: {command}" if _sweep_folder() else ""
            _log.warning("%s: stopped after the end of a run%s.", stop.signal.name, more)
            stop.check()
    return float(results["average_accuracy"])


def _trained_and_published(
    prepared: Any, config: dict[str, Any], directory: Path, continuation: Any
) -> dict[str, Any]:
    """The results of training, which are saved before anything is made of them."""
    from rich.console import Console

    from experiments.recording.files import only_warned, write_whole
    from experiments.recording.label import label_of
    from experiments.recording.tracking import Recorder
    from experiments.reporting.remarks import remarks
    from experiments.reporting.run_report import publish, show_results

    hydra_config, experiment = HydraConfig.get(), prepared.experiment
    choices, scenario = hydra_config.runtime.choices, experiment.benchmark.scenario
    overrides, flags = list(hydra_config.overrides.task), flags_of(hydra_config)
    named = {group: choices[group] for group in ("benchmark", "model", "strategy")}
    title = f"{choices['benchmark']} ({scenario}), {choices['strategy']}"
    label = label_of(choices, overrides, experiment.seed, _sweep_folder(), flags)
    recorded = continuation.state["recorder"] if continuation.state else None
    with Recorder(directory, experiment.wandb, config, label, state=recorded) as recorder:
        # The bars of jobs that run at the same time would overwrite each other.
        console = Console(stderr=True, force_terminal=False if _runs_beside_others() else None)
        results: dict[str, Any] = prepared.run(recorder, console, _log, continuation)
        results |= {"config": config, "overrides": overrides, "flags": flags, "choices": named}
        results["penalty_pull"] = recorder.curve.pull
        results["remarks"] = remarks(results)
        _keep_results(directory, results)
        with only_warned("config.yaml"):
            text = OmegaConf.to_yaml(OmegaConf.create(config))
            write_whole(directory / "config.yaml", text)
        publish(results, recorder, title, directory)
    show_results(results, title, directory, recorder.sync_command)
    return results


def _keep_results(directory: Path, results: dict[str, Any]) -> None:
    """Write the results, or print them if that fails: there is no other copy."""
    from experiments.recording.kept import keep
    from experiments.recording.results import write_results

    try:
        write_results(directory, results)
    except OSError:
        _log.warning("The results cannot be written, so they follow here.")
        print(json.dumps(results))
        raise
    if kept := _kept_file():
        keep(kept, results)


def _runs_beside_others() -> bool:
    """Whether this is a job of a sweep whose launcher runs several jobs at a time."""
    alone = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    return _sweep_folder() is not None and HydraConfig.get().launcher._target_ != alone


def _kept_file() -> Path | None:
    """The file with the kept results of the sweep's jobs, if the sweep has one."""
    from experiments.recording.kept import varied_by

    hydra_config: Any = HydraConfig.get()  # a container, whatever its annotation says
    kept = OmegaConf.select(hydra_config, "callbacks.report.kept")
    if not _sweep_folder() or not kept or varied_by(hydra_config):
        return None
    return Path(hydra_config.runtime.cwd) / str(kept)


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
        accuracy_of_job()
    except BrokenExecutor:  # joblib's
        from experiments.training.stop import AtOnce

        sys.exit(
            f"error: the process of a job was killed, as when memory is exhausted; {AtOnce.advice}"
        )
