"""Avalanche's metrics in Weights & Biases, for any strategy.

It needs nothing else of this project.  Avalanche's own logger fails with W&B 0.29 and later.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue, TensorImage
from avalanche.logging import BaseLogger
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

STEP, TASKS = "step", "tasks_learnt"
"""The axes of the metrics of training and of evaluation."""

_PARTS = {"MB": "batch", "Epoch": "epoch", "Exp": "", "Stream": "stream"}
"""The last word of a metric in Avalanche, and what it is called here."""

_WORDS = {"top1_acc": "accuracy", "top1_running_acc": "running_accuracy"}


class WandBLogger(BaseLogger):
    """Shows what an ``EvaluationPlugin`` measures in a run of W&B.

    Use it as ``EvaluationPlugin(accuracy_metrics(experience=True), loggers=[WandBLogger(run)])``.
    Metrics of training are curves over ``step``.  Those of evaluation are curves over
    ``tasks_learnt``, the experiences trained so far, with one row for each evaluation.  Numbers,
    images, figures and tensors are shown: a matrix as a table, other tensors as histograms.
    Checkpoints of the network are artifacts of type ``model``.

    Args:
        run: the run; ``None`` to begin one with the first metric.
        options: the arguments of ``wandb.init`` for that.

    Attributes:
        options: the arguments of ``wandb.init``.
    """

    def __init__(self, run: wandb.Run | None = None, **options: Any) -> None:
        super().__init__()
        self.options = options
        self._run: wandb.Run | None = None
        self._step = 0
        self._waiting: dict[str, Any] = {}
        if run is not None:
            self._use(run)

    @property
    def run(self) -> wandb.Run:
        """The run, which begins here if it has not."""
        return self._run or self._use(wandb.init(**self.options))

    def log_metrics(self, metric_values: list[MetricValue]) -> None:
        """Take the metrics of one of Avalanche's events."""
        for metric in metric_values:
            self.log_single_metric(metric.name, metric.value, metric.x_plot)

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """Take one metric; it is shown at the end of the step, the epoch or the evaluation."""
        self._step = max(self._step, x_plot)
        if isinstance(value, bytes):
            self._keep(name, value)
        else:
            self._waiting |= shown_as(readable(name), value)

    def after_training_iteration(self, strategy: Any, metric_values: Any) -> None:
        """Show the metrics of a step."""
        self._show({})

    def after_training_epoch(self, strategy: Any, metric_values: Any) -> None:
        """Show the metrics of an epoch."""
        self._show({})

    def after_training_exp(self, strategy: Any, metric_values: Any) -> None:
        """Show the metrics of an experience."""
        self._show({})

    def after_eval(self, strategy: Any, metric_values: Any) -> None:
        """Show the metrics of an evaluation."""
        self._show({TASKS: strategy.clock.train_exp_counter})

    def _show(self, axes: dict[str, int]) -> None:
        if self._waiting:
            self.run.log({STEP: self._step, **axes, **self._waiting})
            self._waiting = {}

    def _keep(self, name: str, content: bytes) -> None:
        """Keep a checkpoint of the network as an artifact."""
        task = next(iter(re.findall(r"Exp(\d+)", name)), "")
        path = Path(self.run.dir) / f"model-task{task}.pth"
        path.write_bytes(content)
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model")
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact, aliases=["latest", f"task{int(task or 0):02d}"])

    def _use(self, run: wandb.Run) -> wandb.Run:
        for axis, metrics in ((STEP, "train/*"), (TASKS, "eval/*")):
            run.define_metric(axis)
            run.define_metric(metrics, step_metric=axis)
        self._run = run
        return run

    def __getstate__(self) -> dict[str, Any]:
        """For Avalanche's checkpoints: the run goes on when the strategy does."""
        options = dict(self.options)
        if self._run is not None:
            options |= {"project": self._run.project, "id": self._run.id, "resume": "allow"}
        return {**self.__dict__, "_run": None, "options": options}


def readable(name: str) -> str:
    """The name here of a metric of Avalanche.

    ``Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp001`` is ``eval/accuracy/task01``.  The task's
    label is left out: an experience has a number already, and of a whole stream Avalanche names the
    label of the last task.
    """
    first, *places = name.split("/")
    words, _, last = first.rpartition("_")
    if last not in _PARTS:
        words, last = first, ""
    word = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words).lower()
    phases = [place.removesuffix("_phase") for place in places if place.endswith("_phase")]
    phase = phases[0] if phases else "train"
    usual = {"train": "train_stream", "eval": "test_stream"}.get(phase)
    streams = [place for place in places if place.endswith("_stream") and place != usual]
    tasks = [f"task{int(place[3:]):02d}" for place in places if place.startswith("Exp")]
    parts = [phase, _WORDS.get(word, word), _PARTS.get(last, ""), *streams, *tasks]
    return "/".join(filter(None, parts))


def shown_as(name: str, value: Any) -> dict[str, Any]:
    """What W&B shows of a metric, by name; nothing of a value of another type."""
    if isinstance(value, AlternativeValues):
        shown: dict[str, Any] = {}
        for alternative in value.alternatives:
            is_table = isinstance(alternative, Tensor) and alternative.dim() == 2
            shown |= shown_as(f"{name}/table" if is_table else name, alternative)
        return shown
    if isinstance(value, Tensor) and value.numel() != 1:
        entries = value.detach().cpu()
        is_matrix = entries.dim() == 2
        return {name: _table(entries) if is_matrix else wandb.Histogram(entries.flatten().tolist())}
    if isinstance(value, TensorImage):
        value = value.image.cpu().numpy()
    if isinstance(value, Image | Figure | np.ndarray):
        return {name: wandb.Image(value)}
    return {name: float(value)} if isinstance(value, float | int | Tensor) else {}


def _table(matrix: Tensor) -> wandb.Table:
    """A matrix with its rows numbered."""
    columns: list[str | int] = ["row", *map(str, range(matrix.shape[1]))]
    rows = [[number, *row] for number, row in enumerate(matrix.tolist())]
    return wandb.Table(columns=columns, data=rows)
