"""Plugins that watch a strategy: they measure and report, and change nothing."""

import logging
import math
import time
from typing import Any, Protocol, runtime_checkable

from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ewc import EWCPenalty, FisherMatrix
from ewc.plugin import check_finite_loss
from experiments.reporting.tracking import Recorder

_log = logging.getLogger(__name__)

RUINED_LOSS, RUINED_SIZE = 10.0, 1e6
"""By what factor the loss and the parameters must have grown for a network to be called ruined."""


@runtime_checkable
class PenaltyPlugin(Protocol):
    """A plugin that adds a quadratic penalty to the loss, as far as a run records it.

    Attributes:
        penalty: all that it remembers of earlier tasks.
        fisher: the weights that the last task has in the penalty; ``None`` before the first.
        last_penalty: the penalty's value in the current iteration.
    """

    penalty: EWCPenalty
    fisher: FisherMatrix | None
    last_penalty: Tensor


class TrainingObserver(SupervisedPlugin):
    """Records loss and penalty of the steps, draws the progress bar, keeps the time.

    It must be the first plugin: its ``after_training_exp`` marks the end of training and
    the begin of what other plugins compute after a task.

    Args:
        recorder: where the records go.
        plugin: the plugin beside it that adds a penalty, if there is one.
        num_tasks: how many tasks there will be.
        log_every: record one step in so many.
        console: where the progress bar is drawn; nothing is drawn off a terminal.

    Attributes:
        train_seconds: the time of all training steps so far.
        trained_at: the clock when the last task's training steps ended.
    """

    def __init__(
        self,
        recorder: Recorder,
        plugin: PenaltyPlugin | None,
        num_tasks: int,
        log_every: int,
        console: Console,
    ) -> None:
        super().__init__()
        self.recorder = recorder
        self.plugin = plugin
        self.num_tasks = num_tasks
        self.log_every = log_every
        self.console = console
        self.train_seconds = 0.0
        self.trained_at = 0.0
        self._started = 0.0
        self._losses: list[Tensor] = []
        self._size = math.nan
        self._said = False
        self._progress: Progress | None = None
        self._bar: Any = None

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start the clock and the task's progress bar."""
        number = strategy.experience.current_experience + 1
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar = self._progress.add_task(
                f"task {number}/{self.num_tasks}", total=len(strategy.dataloader), loss=0.0
            )
            self._progress.start()
        self._losses = []
        if math.isnan(self._size):
            self._size = _size(strategy.model)
        self._started = time.perf_counter()

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Stop a run that diverged.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        check_finite_loss(strategy)
        # The task's own loss: the observer comes before the plugins that add to it.
        self._losses = [*self._losses[:1], strategy.loss.detach()]

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Record the step."""
        step = strategy.clock.train_iterations + 1  # the clock is the last plugin
        if step % self.log_every == 0:
            loss = strategy.loss.item()
            penalty = self.plugin.last_penalty.item() if self.plugin else 0.0
            task = strategy.experience.current_experience
            self.recorder.log(
                {"step": step, "task": task, "train/loss": loss, "train/penalty": penalty}
            )
            if self._progress:
                self._progress.update(self._bar, loss=loss)
        if self._progress:
            self._progress.advance(self._bar)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Stop the clock and the progress bar.

        Raises:
            FloatingPointError: the last step made the parameters infinite or NaN.
        """
        self.trained_at = time.perf_counter()
        self.train_seconds += self.trained_at - self._started
        self.close()
        number = strategy.experience.current_experience + 1
        if not all(bool(p.isfinite().all()) for p in strategy.model.parameters()):
            raise FloatingPointError(
                f"The parameters are not finite after the last step of task "
                f"{number}: a smaller learning rate is needed."
            )
        self._warn_of_ruin(strategy.model, number)

    def _warn_of_ruin(self, model: nn.Module, number: int) -> None:
        """Say once that training has done harm, with numbers that are still finite."""
        first, last = (float(self._losses[k]) for k in (0, -1))
        growth = _size(model) / self._size
        # Below a nat the loss may well rise tenfold, where a penalty holds the network.
        ruined = growth > RUINED_SIZE or last > RUINED_LOSS * max(first, 1.0)
        if ruined and not self._said:
            self._said = True
            _log.warning(
                "In task %d the loss went from %.3g to %.3g, and the parameters are %.3g times as "
                "large as before training: optimizer.lr is probably too large.",
                number,
                first,
                last,
                growth,
            )

    def close(self) -> None:
        """Take the progress bar away; harmless if there is none."""
        if self._progress:
            self._progress.stop()
            self._progress = None


class AccuracyObserver(SupervisedPlugin):
    """The accuracy on each task of an evaluation, by the strategy's own predictions.

    Attributes:
        accuracies: one number a task, from 0 to 1, of the last evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accuracies: list[float] = []
        self._correct: Any = 0
        self._seen = 0

    def before_eval(self, strategy: Any, **_: Any) -> None:
        """Forget the evaluation before."""
        self.accuracies = []

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Start a task."""
        self._correct, self._seen = 0, 0

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        """Count a batch."""
        hits = strategy.mb_output.argmax(1) == strategy.mb_y
        self._correct = self._correct + hits.sum()
        self._seen += len(hits)

    def after_eval_exp(self, strategy: Any, **_: Any) -> None:
        """End a task."""
        self.accuracies.append(float(self._correct) / self._seen)


def _size(model: nn.Module) -> float:
    """The length of all parameters as one vector."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
