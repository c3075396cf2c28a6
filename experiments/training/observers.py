"""Plugins that measure and report, and do not change training."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from ewc.finite_steps import FiniteSteps, task_number
from ewc.growth import Growth
from ewc.parameters import Parameters
from ewc.plugin import PenaltyPlugin
from ewc.wrappers import named_parameters
from experiments.recording.tracking import Recorder
from experiments.training.divergence import warn_of_loss
from experiments.training.progress import RunProgress

NORMS_EVERY = 10
"""Steps from one record with the gradients' norms to the next.

They take a sweep over the parameters each, a tenth of a step of a small network.
"""


class TrainingObserver(SupervisedPlugin):
    """Records the steps, and measures the time.

    Only the progress bar may come before it: its ``after_training_exp`` marks the end of training,
    before other plugins compute something after a task.

    Args:
        recorder: the writer of the records.
        plugin: the plugin that adds a penalty; ``None`` without one.
        log_every: training steps from one record to the next.
        progress: the bar that shows the recorded loss.

    Attributes:
        train_seconds: the time of all training steps so far.
        trained_at: the clock when the last task's training steps ended.
    """

    def __init__(
        self,
        recorder: Recorder,
        plugin: PenaltyPlugin | None,
        log_every: int,
        progress: RunProgress,
    ) -> None:
        super().__init__()
        self.recorder = recorder
        self.plugin = plugin
        self.log_every = log_every
        self.progress = progress
        self.train_seconds = 0.0
        self.trained_at = 0.0
        self._started = 0.0
        self._growth = plugin.growth if plugin else Growth()
        self._finite = FiniteSteps(growth=self._growth)
        self._losses: list[Tensor] = []
        self._norms: dict[str, Tensor] = {}
        self._steps, self._since = 0, 0.0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start the clock."""
        self._finite = FiniteSteps(growth=self._growth)
        self._losses = []
        self._growth.start(strategy.model)
        self._started = time.perf_counter()
        self._steps, self._since = 0, self._started

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Stop a run whose loss is not finite, where no plugin with a penalty does.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not self.plugin:
            self._finite.check_loss(strategy)
        # The task's own loss: the observer comes before the plugins that add to it.  Those of
        # Avalanche do so in place.
        loss = strategy.loss.detach()
        self._losses = [*self._losses[:1], loss if self.plugin else loss.clone()]
        if self.plugin:
            self.plugin.penalty.keeps_gradient = self._measures_norms(_step(strategy))

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Measure the gradients of a step that is recorded with them.

        On an accelerator their norms are also noted where no plugin with a penalty does so.
        """
        if not self.plugin:
            self._finite.note_gradients(strategy)
        if self._measures_norms(_step(strategy)):
            penalty = self.plugin.penalty.last_gradient if self.plugin else None
            self._norms = gradient_norms(strategy.model, penalty)
            if self.plugin:  # it takes as much memory as the parameters
                self.plugin.penalty.last_gradient = None

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Record the step."""
        step = _step(strategy)
        self._steps += 1
        if step % self.log_every == 0:
            values = self._values(strategy)
            task = strategy.experience.current_experience
            now = time.perf_counter()
            seconds = (now - self._since) / self._steps
            self._steps, self._since = 0, now
            self.recorder.log(
                {"step": step, "task": task, **values},
                shown={"train/seconds_per_step": seconds},
            )
            self.progress.loss = values["train/loss"]

    def _measures_norms(self, step: int) -> bool:
        """Whether a step is the first to be recorded of ten."""
        earlier = step - self.log_every
        return step % self.log_every == 0 and step // NORMS_EVERY > earlier // NORMS_EVERY

    def _values(self, strategy: Any) -> dict[str, float]:
        """The metrics of a step; one transfer reads all of them from an accelerator."""
        loss = strategy.loss.detach()
        added = self.plugin.last_penalty if self.plugin else loss - self._losses[-1]
        measured = {
            "train/loss": loss,
            "train/penalty": added,
            "train/task_loss": self._losses[-1],
            "train/accuracy": (strategy.mb_output.argmax(1) == strategy.mb_y).float().mean(),
            **self._norms,
        }
        self._norms = {}
        read = torch.stack([value.to(loss).reshape(()) for value in measured.values()]).tolist()
        values = dict(zip(measured, read, strict=True))
        if not self.plugin and values["train/penalty"] != 0:
            # Of what another plugin adds to the loss the gradient is not known.
            values.pop("train/task_gradient_norm", None)
        return {**values, "train/learning_rate": float(strategy.optimizer.param_groups[0]["lr"])}

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Stop the clock.

        Raises:
            FloatingPointError: a loss, the parameters or the optimizer's state are not finite.
        """
        self.trained_at = time.perf_counter()
        self.train_seconds += self.trained_at - self._started
        if not self.plugin:
            self._finite.look(strategy)
        task, step = task_number(strategy), strategy.clock.train_exp_iterations
        self._growth.check(strategy.model, task, step)
        if self._losses:
            first, last = (float(self._losses[k]) for k in (0, -1))
            warn_of_loss(self._growth, first, last, task)

    def state(self) -> dict[str, Any]:
        """The time and the losses so far."""
        return {
            "train_seconds": self.train_seconds + time.perf_counter() - self._started,
            "losses": self._losses,
            "initial_norms": self._growth.initial,
            "warned": self._growth.warned,
        }

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        self.train_seconds = state["train_seconds"]
        self._started = time.perf_counter()
        self._steps, self._since = 0, self._started
        self._losses = [loss.to(strategy.device) for loss in state["losses"]]
        self._growth.restore(state["initial_norms"], warned=state["warned"])


def _step(strategy: Any) -> int:
    """The number of the present step, from 1; the clock is the last plugin."""
    return int(strategy.clock.train_iterations) + 1


def gradient_norms(model: nn.Module, penalty: Parameters | None) -> dict[str, Tensor]:
    """The norm of the task's gradient, and that of the penalty's if it is known.

    Args:
        model: the network, with the gradient of the loss in ``.grad``.
        penalty: the penalty's part of it, by parameter.
    """
    gradients = {n: p.grad for n, p in named_parameters(model) if p.grad is not None}
    if penalty is None:
        return {"train/task_gradient_norm": torch.nn.utils.get_total_norm(gradients.values())}
    shared = [name for name in gradients if name in penalty]
    gradients |= zip(
        shared,
        torch._foreach_sub([gradients[n] for n in shared], [penalty[n] for n in shared]),
        strict=True,
    )
    return {
        "train/task_gradient_norm": torch.nn.utils.get_total_norm(gradients.values()),
        "train/penalty_gradient_norm": torch.nn.utils.get_total_norm(penalty.values()),
    }


class AccuracyObserver(SupervisedPlugin):
    """The accuracy on each task of an evaluation, from the strategy's predictions.

    Attributes:
        accuracies: one number per task, from 0 to 1, of the last evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accuracies: list[float] = []
        self._correct: Any = 0
        self._seen = 0

    def before_eval(self, strategy: Any, **_: Any) -> None:
        """Start an evaluation."""
        self.accuracies = []

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Start a task."""
        self._correct, self._seen = 0, 0

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        """Count a batch."""
        hits = strategy.mb_output.argmax(1) == strategy.mb_y
        self._correct = self._correct + hits.sum()
        self._seen += len(hits)

    def state(self) -> dict[str, Any]:
        """Nothing: an evaluation starts anew."""
        return {}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Nothing to restore."""

    def after_eval_exp(self, strategy: Any, **_: Any) -> None:
        """End a task."""
        self.accuracies.append(float(self._correct) / self._seen)
