"""One experiment: tasks one after the other, measured after each."""

import os
import platform
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.training.plugins import EvaluationPlugin
from rich.console import Console
from safetensors.torch import save_model
from torch import nn

from ewc import FisherMatrix
from ewc import __version__ as ewc_version
from ewc.checks import check_count, shown
from ewc.parameters import trainable_parameters
from ewc.plugin import EWCPlugin, PenaltyPlugin
from experiments.configuration.command_line import sentence
from experiments.recording.metrics import average_accuracy, backward_transfer, forgetting
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Strategy
from experiments.tasks.benchmarks import Benchmark, Tasks
from experiments.tasks.images import default_data_root
from experiments.training.course import Course
from experiments.training.divergence import accuracy_of_guessing, warn_of_unlearnt
from experiments.training.memory import kept_bytes, peak_memory, reset_peak_memory
from experiments.training.models import Network
from experiments.training.observers import AccuracyObserver, TrainingObserver
from experiments.training.progress import RunProgress
from experiments.training.protocol import Training
from experiments.training.resume import Boundary, Continuation, Stateful
from experiments.training.schedule import CosineAnnealing, TailAverage

MOST_THREADS = 1024
"""Far more threads end the process without a message."""


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the outcome of a run.

    Attributes:
        benchmark: the stream of tasks.
        model: the network.
        optimizer: makes the optimizer from the parameters.
        training: how each task is trained.
        strategy: the method against forgetting.
        fisher: how the Fisher information is taken.
        wandb: how the run appears in W&B.
        seed: the seed of the tasks, the initial weights and the order of the images.
        data_root: the folder of downloaded data; ``None`` for the environment's ``EWC_DATA`` or
            a folder in the user's cache.
        device: ``cpu``, ``cuda``, ...; ``auto`` for CUDA where available.
        threads: CPU threads; small networks are fastest with one per process.
        trusted: modules whose classes the configuration may name besides those of the known
            packages; only the command line sets it.

    Raises:
        ValueError: the device does not exist or does not compute, or the seed or the number of
            threads is out of range.
    """

    benchmark: Benchmark
    model: Network
    optimizer: partial[torch.optim.Optimizer]
    training: Training
    strategy: Strategy
    fisher: Fisher = field(default_factory=Fisher)
    wandb: WandB = field(default_factory=WandB)
    seed: int = 0
    data_root: str | None = None
    device: str = "auto"
    threads: int = 1
    trusted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check what can be checked before anything is written."""
        check_count(self.threads, "threads")
        if self.threads > MOST_THREADS:
            raise ValueError(
                f"threads must be at most {MOST_THREADS}, got {self.threads}; more threads than "
                "CPUs are no faster."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}.")
        try:
            torch.zeros(1, device=self.torch_device).item()  # "meta" has tensors without numbers
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device must be one that PyTorch can use, such as cpu, got {shown(self.device)} "
                f"({sentence(error)[:200]})."
            ) from None

    @property
    def torch_device(self) -> torch.device:
        """The device, with ``auto`` resolved."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def prepare(self) -> "Prepared":
        """Load the data and build network and optimizer; nothing is written yet.

        Raises:
            FileNotFoundError: the data are missing.
            ValueError: the optimizer rejects its arguments or needs more than gradients for a
                step, data are damaged, or the network or the Fisher matrix does not fit into
                memory.
        """
        torch.set_num_threads(self.threads)
        # Dead pixels and saturated outputs give denormal numbers, which are up to 6 times slower.
        torch.set_flush_denormal(True)
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        root = Path(self.data_root).expanduser() if self.data_root else default_data_root()
        tasks = self.benchmark.build(root, self.seed, self.torch_device)
        model = self._network(tasks)
        optimizer = self._optimizer(model)
        for plugin in self.strategy.plugins(self.fisher):
            if isinstance(plugin, EWCPlugin):
                # A matrix too large for the machine raises now, not after the first task.
                plugin.structure.accumulator(trainable_parameters(model))
        return Prepared(self, tasks, model, optimizer, _versions())

    def _network(self, tasks: Tasks) -> nn.Module:
        """The network on its device, after a check that it fits into memory."""
        sizes = tasks.num_pixels, tasks.num_outputs, tasks.num_heads
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                parameters = list(self.model.build(*sizes).parameters())
        except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
            raise ValueError(f"model: {sentence(error)}") from error
        # Linux grants memory that it does not have, and kills the process when it is used.
        needed = 2 * sum(p.numel() * p.element_size() for p in parameters)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        count = sum(p.numel() for p in parameters)
        too_large = (
            f"model: {count} parameters and their gradients take {needed / 1e9:.0f} GB, more than "
            "there is: take a smaller network."
        )
        if self.torch_device.type == "cpu" and needed > memory:
            raise ValueError(too_large)
        try:
            return self.model.build(*sizes).to(self.torch_device)
        except RuntimeError as error:
            raise ValueError(too_large) from error

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, after a trial step on one number."""
        try:
            optimizer: torch.optim.Optimizer = self.optimizer(model.parameters())
            trial = nn.Parameter(torch.zeros(1, 1, device=self.torch_device))
            trial.grad = torch.ones_like(trial)
            step = self.optimizer([trial]).step
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"optimizer: {sentence(error)}") from error
        try:
            step()
        except Exception as error:
            raise ValueError(
                "optimizer must take steps from gradients alone, such as torch.optim.SGD, got "
                f"{type(optimizer).__name__} ({sentence(error)})."
            ) from error
        return optimizer


@dataclass(frozen=True)
class Prepared:
    """An experiment with its data, network and optimizer, and the versions it runs with."""

    experiment: Experiment
    tasks: Tasks
    model: nn.Module
    optimizer: torch.optim.Optimizer
    versions: dict[str, str]

    @property
    def deciding_versions(self) -> dict[str, str]:
        """What besides the configuration decides the numbers of a run that goes on."""
        versions = {name: self.versions[name] for name in ("ewc", "torch")}
        return {**versions, "device": self.experiment.torch_device.type}

    def run(
        self,
        recorder: Recorder,
        console: Console,
        log: Any,
        continuation: Continuation | None = None,
    ) -> dict[str, Any]:
        """Train on every task, evaluate on all after each, and keep checkpoints.

        Args:
            recorder: the writer of the records.
            console: the console for the progress bar.
            log: a logger for one line per task.
            continuation: the checkpoint to go on from, where new ones are written, and the signal
                that ends the run; ``None`` for a run without checkpoints.

        Returns:
            The content of ``results.json`` without the configuration.  Besides the accuracies it
            has per task ``guessing``, the accuracy of guessing and its standard error;
            ``fisher_overlap``, the overlap of its Fisher information with that of the first task
            by layer; and ``fisher`` (:func:`~experiments.training.information.described`).
            ``initial_accuracies`` are those of the untrained network.  ``memory`` has the ``peak``
            of the run and what the strategy's plugins with a state have ``kept`` after the last
            task, in bytes.

        Raises:
            FloatingPointError: the loss became infinite or NaN.
            SystemExit: a signal asks for the end; there is a checkpoint.
        """
        continuation = continuation or Continuation()
        reset_peak_memory(self.experiment.torch_device)
        experiment, training = self.experiment, self.experiment.training
        plugins = experiment.strategy.plugins(experiment.fisher)
        penalised = next((p for p in plugins if isinstance(p, PenaltyPlugin)), None)
        train_stream = self.tasks.scenario.streams["train"]
        test_stream = self.tasks.scenario.streams["test"]
        guessing = [accuracy_of_guessing(task.data.labels) for task in test_stream]
        progress = RunProgress(console, train_stream)
        observer = TrainingObserver(recorder, penalised, training.log_every, progress)
        meter = AccuracyObserver()
        annealing = [CosineAnnealing()] if training.anneal else []
        average = [TailAverage(training.tail_average)] if training.tail_average else []
        course, begin = Course(), 0
        if state := continuation.state:
            course, begin = Course.from_state(state["course"], self.model), state["task"]
            self.model.load_state_dict(state["training"]["model"])
            log.info("continued in task %d after step %d", begin + 1, state["step"])
        all_plugins = [observer, *average, *plugins, *annealing, meter]
        boundary = Boundary(
            continuation,
            all_plugins,
            training.checkpoint_minutes,
            lambda: {"course": course.state(), "recorder": recorder.state()},
        )
        loop = experiment.strategy.template()(
            model=self.model,
            optimizer=self.optimizer,
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=training.batch_size,
            eval_mb_size=training.eval_batch_size,
            iterations=training.iterations,
            epochs=training.epochs,
            fisher_batch_size=experiment.fisher.batch_size,
            seed=experiment.seed,
            device=experiment.torch_device,
            plugins=[progress, *all_plugins],
            evaluator=EvaluationPlugin(loggers=[]),
            boundary=boundary,
            progress=progress,
        )
        try:
            if state is None:
                course.eval_seconds += _evaluated(loop, test_stream)
                course.initial = meter.accuracies
            for number, experience in enumerate(train_stream):
                if number < begin:
                    continue
                course.begin(self.model, goes_on=state is not None and number == begin)
                loop.train(experience, reset_optimizer_state=training.reset_optimizer)
                trained = time.perf_counter()
                course.eval_seconds += _evaluated(loop, test_stream)
                # The time after the last step is that of the Fisher pass, if there is one.
                fisher_seconds = trained - observer.trained_at if penalised else 0.0
                course.fisher_seconds += fisher_seconds
                course.matrix.append(meter.accuracies)
                warn_of_unlearnt(course.matrix, guessing)
                record = _task_record(number, course.matrix, course.drift(self.model))
                if penalised and penalised.fisher is not None:
                    record |= _fisher_record(course, penalised.fisher, fisher_seconds)
                _log_task(recorder, number, record, fisher_seconds)
                _keep_artifacts(recorder, number, self.model, penalised)
                log.info(
                    "task %d/%d: accuracy on it %.2f %%, on all tasks so far %.2f %%",
                    number + 1,
                    len(train_stream),
                    100 * course.matrix[-1][number],
                    100 * record["eval/average_accuracy"],
                )
                course.train_seconds = observer.train_seconds
            if begin < len(train_stream):
                boundary.ended(loop, len(train_stream))
        finally:
            progress.close()
        return {
            "average_accuracy": average_accuracy(course.matrix),
            "forgetting": forgetting(course.matrix),
            "backward_transfer": backward_transfer(course.matrix),
            "accuracy_matrix": course.matrix,
            "guessing": guessing,
            "initial_accuracies": course.initial,
            "fisher": course.information,
            "fisher_overlap": course.overlaps,
            "seconds": course.seconds,
            "memory": {
                "peak": peak_memory(experiment.torch_device),
                "kept": sum(kept_bytes(p.state()) for p in plugins if isinstance(p, Stateful)),
            },
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seed": experiment.seed,
            "versions": self.versions,
            "device": str(experiment.torch_device),
        }


def _evaluated(loop: Any, stream: Any) -> float:
    """Evaluate on a stream; the seconds that it took."""
    started = time.perf_counter()
    loop.eval(stream)
    return time.perf_counter() - started


def _task_record(number: int, matrix: list[list[float]], drift: float) -> dict[str, float | int]:
    """The metrics after a task, by name."""
    record: dict[str, float | int] = {"task": number}
    for task, accuracy in enumerate(matrix[-1]):
        record[f"eval/accuracy/task{task:02d}"] = accuracy
    record["eval/average_accuracy"] = average_accuracy(matrix)
    record["eval/forgetting"] = forgetting(matrix)
    record["drift"] = drift
    return record


def _fisher_record(course: Course, fisher: FisherMatrix, seconds: float) -> dict[str, float]:
    """The metrics of a task's Fisher information, by name."""
    information = course.describe(fisher, seconds)
    record = {"fisher/trace": information["trace"]}
    for name, layer in information["layers"].items():
        record[f"fisher/layer_trace/{name}"] = layer["trace"]
        if layer["eigenvalues"]:
            record[f"fisher/largest_eigenvalue/{name}"] = layer["eigenvalues"][0]
    overlap = course.overlap(fisher)
    return record | {f"fisher/overlap/{name}": value for name, value in overlap.items()}


def _log_task(
    recorder: Recorder, number: int, record: Mapping[str, float], fisher_seconds: float
) -> None:
    """Log the metrics after a task; what W&B shows are curves over the tasks."""
    hidden, shown = {}, {}
    if "fisher/trace" in record:
        hidden = {f"fisher/trace/task{number:02d}": record["fisher/trace"]}
        shown = {"fisher/seconds": fisher_seconds}
    recorder.log(record, hidden=hidden, shown=shown)


def _keep_artifacts(
    recorder: Recorder, number: int, model: nn.Module, penalised: PenaltyPlugin | None
) -> None:
    """Keep the network after a task, its Fisher information and the penalty, as artifacts."""
    recorder.artifact("model", number, partial(save_model, model))
    if penalised and penalised.fisher is not None:
        recorder.artifact("fisher", number, penalised.fisher.save)
        recorder.artifact("penalty", number, penalised.penalty.save)


def _versions() -> dict[str, str]:
    """The versions of the packages; ``unknown`` for one that is on the path but not installed."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ewc": ewc_version,
    }
    for name in ("avalanche-lib", "hydra-core", "wandb", "numpy", "scikit-learn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
