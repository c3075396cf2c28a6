"""A search for the best options with Optuna, which goes on where it stopped."""

import contextlib
import fcntl
import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from experiments.configuration.command_line import flags_of
from experiments.configuration.schema import sets_no_outcome
from experiments.configuration.targets import ConfigurationError, check_installed
from experiments.recording.files import only_warned, write_whole
from experiments.recording.folder import IN_USE
from experiments.recording.sweep import failure_of
from experiments.sweeping.samplers import Bayesian, Sampler
from experiments.sweeping.space import Space

_log = logging.getLogger(__name__)

STUDY = "study.db"
"""The file of the study in a sweep's folder, a SQLite database."""

LOCK = "study.lock"

SUMMARY = "optimization.json"
"""The file of the trials and the best of them in a sweep's folder."""


@dataclass(frozen=True)
class Search:
    """A search for the options whose jobs have the best average accuracy.

    A trial is the job of its number.  The study lies in the sweep's folder.  The same command
    with the same folder goes on: a trial that was cut short is finished first.  A trial depends
    on those before it and the seed alone, so a search that was cut short finds the same.

    A job that diverges counts as the worst accuracy there is: 0, or 1 where the smallest is
    searched for.  The sampler then keeps away from it.  It orders trials by their values, so how
    bad the value is does not matter.  A job that fails has no value, as its options need not be
    the cause.  The sampler keeps away from it too, and the next command runs it again.

    Attributes:
        direction: ``maximize`` or ``minimize``.
        n_trials: the number of trials, with those of earlier commands.
        n_jobs: the number of trials that the launcher gets at a time.
        seed: the seed of the sampler.
        sampler: how the next trial is chosen.
        params: options with their values, as in ``hydra.sweeper.params``.

    Raises:
        ValueError: a number is out of range.
    """

    direction: Literal["maximize", "minimize"] = "maximize"
    n_trials: int = 20
    n_jobs: int = 1
    seed: int = 0
    sampler: Sampler = field(default_factory=Bayesian)
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("n_trials", 1), ("n_jobs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def run(
        self,
        arguments: Sequence[str],
        config: DictConfig,
        launcher: Launcher,
        check: Callable[[list[list[str]]], None],
    ) -> float:
        """Run the trials that are missing, and report the best one.

        Args:
            arguments: the overrides of the command line.
            config: the configuration of the sweep.
            launcher: runs the jobs.
            check: checks that jobs can be composed.

        Returns:
            The best value.

        Raises:
            ConfigurationError: the overrides span no space, or the folder has another search.
        """
        check_installed("optuna", "sweep")
        overrides = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        space = Space.parsed(overrides, launcher.hydra_context.config_loader)  # type: ignore[attr-defined]
        check(space.examples())
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            study = self._study(folder, space)
            OmegaConf.save(config, folder / "multirun.yaml")
            run: set[int] = set()

            def command(values: dict[str, Any]) -> str:
                words = [*flags_of(config.hydra), *space.overrides(values)]
                return shlex.join(["python", "-m", "experiments.run", *words])

            while batch := self._next(study, space, run):
                for trials in _consecutive(batch):
                    self._run(trials, study, space, folder, launcher)
                run |= {trial.number for trial in batch}
                with only_warned(SUMMARY):
                    write_whole(folder / SUMMARY, json.dumps(_summary(study, command), indent=2))
        return _report(study, command)

    def _study(self, folder: Path, space: Space) -> Any:
        """The study in the folder, which is made if there is none."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{folder / STUDY}",
            direction=self.direction,
            load_if_exists=True,
        )
        searched = {key: override.input_line for key, override in space.searched.items()}
        here = {
            "direction": self.direction,
            "searched": [str(line).partition("=")[2] for line in searched.values()],
            "options": sorted(searched),
            "fixed": [o for o in space.fixed.values() if not sets_no_outcome(o)],
        }
        there = study.user_attrs.get("search", here)
        if there != here:
            raise ConfigurationError(
                f"{os.path.relpath(folder)} holds another search "
                f"({' '.join([*there['options'], *there['fixed'], there['direction']])}): choose "
                "another folder with hydra.sweep.dir=DIR, or give the same command."
            )
        study.set_user_attr("search", here)
        return study

    def _next(self, study: Any, space: Space, run: set[int]) -> list[Any]:
        """The trials that run next: those that were cut short or failed, then new ones.

        Args:
            study: the study.
            space: its space.
            run: the numbers of trials that this command has run.
        """
        from optuna.trial import TrialState

        unfinished = _unfinished(study)
        for number, trial in list(unfinished.items()):
            if len(trial.params) < len(space.searched):  # cut short before it had options
                study.tell(number, state=TrialState.FAIL)
                del unfinished[number]
        if earlier := sorted(unfinished.keys() - run):
            return [unfinished[number] for number in earlier]
        made = len(study.get_trials(deepcopy=False))
        trials = []
        for number in range(made, min(made + self.n_jobs, self.n_trials)):
            # A sampler of its own for each trial: its numbers do not depend on earlier processes.
            seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
            study.sampler = self.sampler.built(seed)
            trials.append(study.ask(space.distributions()))
        return trials

    def _run(
        self, trials: list[Any], study: Any, space: Space, folder: Path, launcher: Launcher
    ) -> None:
        """Run trials of consecutive numbers, and tell the study how they ended."""
        overrides = [space.overrides(trial.params) for trial in trials]
        returned = launcher.launch(overrides, initial_job_idx=trials[0].number)
        for trial, job in zip(trials, returned, strict=True):
            if failure_of(folder, trial.number):
                continue
            value = float(job.return_value)
            worst = 0.0 if self.direction == "maximize" else 1.0
            study.tell(trial.number, worst if math.isnan(value) else value)


def _unfinished(study: Any) -> dict[int, Any]:
    """The trials without an end, by number."""
    return {t.number: t for t in study.get_trials(deepcopy=False) if not t.state.is_finished()}


def _consecutive(trials: Sequence[Any]) -> Iterator[list[Any]]:
    """Trials in groups of consecutive numbers, as launchers number their jobs."""
    for _, group in groupby(enumerate(trials), lambda entry: entry[1].number - entry[0]):
        yield [trial for _, trial in group]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a search."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"{os.path.relpath(folder)} {IN_USE} another search: wait for its end, or choose "
                "another folder with hydra.sweep.dir=DIR."
            ) from error
        except OSError as error:
            _log.warning("%s cannot be locked (%s).", os.path.relpath(folder), error.strerror)
        yield


def _summary(study: Any, command: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """The trials of a study that have ended, and the best of them with its command."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    summary: dict[str, Any] = {"direction": study.direction.name.lower()}
    if ended:
        best = study.best_trial
        words = command(best.params)
        summary["best"] = {"trial": best.number, "value": best.value, "command": words}
    summary["trials"] = [
        {"trial": trial.number, "value": trial.value, "options": trial.params} for trial in ended
    ]
    return summary


def _report(study: Any, command: Callable[[dict[str, Any]], str]) -> float:
    """Print the best trial; its value, NaN if none has ended."""
    summary = _summary(study, command)
    if "best" not in summary:
        return math.nan
    best = summary["best"]
    print(
        f"best of {len(summary['trials'])} trials: job {best['trial']}, average accuracy "
        f"{100 * best['value']:.2f} %: {best['command']}"
    )
    return float(best["value"])
