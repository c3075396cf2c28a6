"""Jobs that submitit runs: on a Slurm cluster, or in processes of this machine."""

import logging
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from experiments.configuration.schema import plain
from experiments.configuration.targets import ConfigurationError, check_installed, shown
from experiments.recording.folder import finished
from experiments.recording.sweep import note_failure

_log = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between two looks at the jobs."""


@dataclass(frozen=True)
class Submission:
    """How jobs are submitted.

    Attributes:
        cluster: ``slurm``, or ``local`` for processes of this machine.
        array_parallelism: the number of jobs at a time.
        timeout_min: minutes after which a job is ended.
        signal_delay_s: seconds before that at which it is asked to write a checkpoint.
        max_num_timeout: how often a job that ran out of time is submitted again, to go on.
        cpus_per_task: CPUs of a job, on Slurm.
        gpus_per_node: GPUs of a job.
        mem_gb: memory of a job in GB, on Slurm; ``None`` for the cluster's default.
        partition: the partition, on Slurm.
        account: the account, on Slurm.
        qos: the quality of service, on Slurm.
        constraint: the features that nodes must have, on Slurm.

    Raises:
        ValueError: a number is out of range, or a text has characters that Slurm does not take.
    """

    cluster: Literal["slurm", "local"]
    array_parallelism: int
    timeout_min: float
    signal_delay_s: int
    max_num_timeout: int
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    mem_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("array_parallelism", "cpus_per_task"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if 60 * self.timeout_min <= self.signal_delay_s:
            raise ValueError(
                f"signal_delay_s must be shorter than timeout_min, got {self.signal_delay_s} s of "
                f"{self.timeout_min} min."
            )
        for name in ("partition", "account", "qos", "constraint"):
            value = getattr(self, name)
            # The text becomes part of a script.
            if value is not None and not re.fullmatch(r"[\w.,&|*()\[\]:+-]+", value):
                raise ValueError(f"{name} must be a word that Slurm knows, got {shown(value)}.")

    def run(
        self,
        overrides: Sequence[Sequence[str]],
        first: int,
        context: HydraContext,
        config: DictConfig,
        task_function: TaskFunction,
    ) -> list[JobReturn]:
        """Run jobs, and wait for all of them.

        A job that has finished before is not submitted.  One whose process dies is noted as
        failed.

        Args:
            overrides: the options of each job.
            first: the number of the first job.
            context: Hydra's.
            config: the configuration of the sweep.
            task_function: the body of a job.

        Raises:
            ConfigurationError: there is no Slurm here.
        """
        executor = self._executor(Path(config.hydra.sweep.dir))
        returned: dict[int, JobReturn] = {}
        waiting: dict[int, SubmittedJob] = {}
        for number, chosen in enumerate(overrides, first):
            # Composed here, where the command line is known.
            composed = context.config_loader.load_sweep_config(config, list(chosen))
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = f"job_{number}", number
            job = SubmittedJob(context, composed, task_function)
            if job.is_decided():
                returned[number] = job.run()
            else:
                _log.info("#%d: %s", number, " ".join(filter_overrides(list(chosen))))
                waiting[number] = job
        returned |= self._wait(executor, waiting, config)
        return [returned[number] for number in sorted(returned)]

    def _executor(self, sweep: Path) -> Any:
        """Submitit's executor, with the parameters of the jobs."""
        check_installed("submitit", "slurm")
        import submitit

        folder = sweep / ".submitit" / "%j"
        if self.cluster == "local":
            executor: Any = submitit.LocalExecutor(folder, max_num_timeout=self.max_num_timeout)
            executor.update_parameters(
                timeout_min=self.timeout_min,
                signal_delay_s=self.signal_delay_s,
                gpus_per_node=self.gpus_per_node,
            )
            return executor
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=self.max_num_timeout)
        except RuntimeError as error:
            raise ConfigurationError(
                "There is no Slurm on this machine (srun is not on the path): "
                "hydra/launcher=submitit_local runs the same jobs in processes of it."
            ) from error
        own = ("partition", "account", "qos", "constraint")
        executor.update_parameters(
            job_name="ewc",
            time=math.ceil(self.timeout_min),
            mem=f"{self.mem_gb}GB" if self.mem_gb else None,
            cpus_per_task=self.cpus_per_task,
            gpus_per_node=self.gpus_per_node or None,
            signal_delay_s=self.signal_delay_s,
            array_parallelism=self.array_parallelism,
            setup=["export WANDB_MODE=offline"],  # nodes reach no server
            **{name: getattr(self, name) for name in own if getattr(self, name)},
        )
        return executor

    def _wait(
        self, executor: Any, waiting: dict[int, "SubmittedJob"], config: DictConfig
    ) -> dict[int, JobReturn]:
        """Submit the jobs, and wait for their ends."""
        returned: dict[int, JobReturn] = {}
        running: dict[int, Any] = {}
        jobs = dict(waiting)
        try:
            while waiting or running:
                # Slurm itself holds back the jobs of an array.
                free = self.array_parallelism - len(running)
                many = len(waiting) if self.cluster == "slurm" else free
                numbers = list(waiting)[:many]
                if numbers:
                    with _uninterrupted(), executor.batch():
                        running |= {n: executor.submit(waiting.pop(n)) for n in numbers}
                for number, job in list(running.items()):
                    if job.done():
                        returned[number] = jobs[number].outcome(running.pop(number))
                time.sleep(POLL)
        except SystemExit:
            self._leave(list(running.values()))
            raise
        return returned

    def _leave(self, running: Sequence[Any]) -> None:
        """Have the processes of this machine write their checkpoints; Slurm's jobs stay."""
        if self.cluster == "slurm":
            names = " ".join(sorted({str(job.job_id).partition("_")[0] for job in running}))
            _log.warning("The jobs stay with Slurm; to remove them: scancel %s", names)
            return
        for job in running:
            job._process.terminate()
        for job in running:
            job._process.wait()


class SubmittedJob:
    """A job for another process; submitit calls it again after a requeue.

    Args:
        context: Hydra's.
        config: the composed configuration of the job.
        task_function: the body of the job.
    """

    def __init__(
        self, context: HydraContext, config: DictConfig, task_function: TaskFunction
    ) -> None:
        self.context = context
        self.config = config
        self.task_function = task_function
        self.singletons = Singleton.get_state()

    def __call__(self) -> JobReturn:
        """Run the job in a process of its own."""
        Singleton.set_state(self.singletons)
        return self.run()

    def checkpoint(self) -> Any:
        """What submitit is to start after a requeue: the same, as a job goes on by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def run(self) -> JobReturn:
        """Run the job in this process."""
        setup_globals()
        return run_job(
            hydra_context=self.context,
            task_function=self.task_function,
            config=self.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def is_decided(self) -> bool:
        """Whether the job has finished, or its folder belongs to another run."""
        config = self.config.copy()
        with open_dict(config):
            del config["hydra"]
        sweep = self.config.hydra.sweep
        try:
            return finished(Path(sweep.dir) / sweep.subdir, plain(config)) is not None
        except ConfigurationError:
            return True

    def outcome(self, submitted: Any) -> JobReturn:
        """What the job returned; NaN, and a note in the sweep's folder, if its process died.

        Args:
            submitted: submitit's job, which has ended.
        """
        try:
            returned: JobReturn = submitted.result()
        except RuntimeError as error:  # submitit's
            _log.debug("%s", error)
            hydra, output = self.config.hydra, os.path.relpath(submitted.paths.stderr)
            reason = f"the process ended without a result; it wrote {output}"
            _log.error("job %d: %s", hydra.job.num, reason)
            note_failure(Path(hydra.sweep.dir), hydra.job.num, hydra.overrides.task, reason)
            returned = JobReturn(status=JobStatus.COMPLETED, _return_value=math.nan)
        return returned


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have processes started here ignore Ctrl-C, which the terminal would send to them too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
