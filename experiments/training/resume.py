"""How a run goes on from a checkpoint, to the same numbers as without an interruption."""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.optim import Optimizer

from ewc.finite_steps import not_finite
from experiments.recording.checkpoints import Checkpoints
from experiments.recording.files import only_warned
from experiments.recording.folder import CHECKPOINTS
from experiments.training.stop import Stop

_log = logging.getLogger(__name__)

COUNTERS = (
    "train_iterations",
    "train_exp_counter",
    "train_exp_epochs",
    "train_exp_iterations",
    "train_epoch_iterations",
    "total_iterations",
)
"""The counters of Avalanche's clock."""


@runtime_checkable
class Stateful(Protocol):
    """A plugin whose state can be kept between two training steps."""

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs: tensors and plain values."""
        ...

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state, after the plugin's ``before_training_exp``."""
        ...


@dataclass(frozen=True)
class Continuation:
    """What a run goes on from, and how it can be interrupted.

    Attributes:
        checkpoints: where checkpoints are written; ``None`` to write none.
        state: the state of the newest checkpoint; ``None`` to start.
        stop: the signal that ends the run.
        command: what continues the run later, for a message.
    """

    checkpoints: Checkpoints | None = None
    state: Mapping[str, Any] | None = None
    stop: Stop = field(default_factory=Stop)
    command: str = "the same command"


class Boundary:
    """What happens between two training steps: checkpoints, and the end after a signal.

    Args:
        continuation: where checkpoints are written, and what the run goes on from.
        plugins: the plugins of the strategy, whose states are kept.
        minutes: the time from one checkpoint to the next within a task; ``None`` for one at the
            end of each task only.
        rest: gives the state of everything besides training.
    """

    def __init__(
        self,
        continuation: Continuation,
        plugins: Sequence[Any],
        minutes: float | None,
        rest: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.checkpoints = continuation.checkpoints
        self.stop = continuation.stop
        self.command = continuation.command
        self.plugins = list(plugins)
        self.minutes = minutes
        self.rest = rest
        self._resumed = continuation.state
        self._order = torch.empty(0)
        self._written_at = time.monotonic()
        for plugin in self.plugins:
            if self.checkpoints and not isinstance(plugin, Stateful):
                _log.warning(
                    "%s has no state() and restore(), so no checkpoints are written.",
                    type(plugin).__name__,
                )
                self.checkpoints = None

    def start(self, strategy: Any) -> int:
        """Start the steps of a task: the number of those that an earlier process has done."""
        state, self._resumed = self._resumed, None
        if state is not None:
            self._restore(strategy, state["training"])
        self._order = strategy.generator.get_state()
        if state is None:
            return 0
        return int(state["step"])

    def reached(self, strategy: Any) -> None:
        """Write a checkpoint if one is due, and end after a signal.

        Raises:
            SystemExit: a signal asks for the end.
        """
        task = strategy.experience.current_experience
        step = strategy.clock.train_exp_iterations
        minutes = (time.monotonic() - self._written_at) / 60
        begins = step == 0 and task > 0
        stops = self.stop.asked()
        if begins or stops or (self.minutes is not None and minutes >= self.minutes):
            self._write(strategy, task, step)
        if stops:
            assert self.stop.signal
            start = "the start" if self.checkpoints is None else "its newest checkpoint"
            _log.warning(
                "%s: the run stops in task %d after step %d; to continue it from %s: %s",
                self.stop.signal.name,
                task + 1,
                step,
                start,
                self.command,
            )
            self.stop.check()

    def ended(self, strategy: Any, num_tasks: int) -> None:
        """Write the checkpoint after the last task."""
        self._order = strategy.generator.get_state()
        self._write(strategy, num_tasks, 0)

    def _write(self, strategy: Any, task: int, step: int) -> None:
        # A run whose numbers are lost is about to end: the last good checkpoint stays.
        if self.checkpoints and not not_finite(strategy.model, strategy.optimizer):
            with only_warned(CHECKPOINTS):  # the earlier ones stay
                state = {"training": self._state(strategy), **self.rest()}
                self.checkpoints.write(task, step, state)
        self._written_at = time.monotonic()

    def _state(self, strategy: Any) -> dict[str, Any]:
        return {
            "model": strategy.model.state_dict(),
            "optimizer": optimizer_state(strategy.optimizer),
            "plugins": [plugin.state() for plugin in self.plugins],
            "clock": {name: getattr(strategy.clock, name) for name in COUNTERS},
            "order": self._order,
            "random": random_states(strategy.device),
        }

    def _restore(self, strategy: Any, state: Mapping[str, Any]) -> None:
        strategy.model.load_state_dict(state["model"])
        restore_optimizer(strategy.optimizer, state["optimizer"])
        for plugin, inner in zip(self.plugins, state["plugins"], strict=True):
            plugin.restore(inner, strategy)
        for name in COUNTERS:
            setattr(strategy.clock, name, state["clock"][name])
        strategy.generator.set_state(state["order"])
        restore_random_states(state["random"], strategy.device)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer with text as keys."""
    state = optimizer.state_dict()
    entries = {str(number): dict(entry) for number, entry in state["state"].items()}
    return {"state": entries, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of :func:`optimizer_state`."""
    entries = {int(number): dict(entry) for number, entry in state["state"].items()}
    groups = [dict(group) for group in state["param_groups"]]
    for group, present in zip(groups, optimizer.param_groups, strict=True):
        for name, value in present.items():  # JSON has lists only
            if isinstance(value, tuple):
                group[name] = tuple(group[name])
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators of torch, CUDA, NumPy and Python."""
    numpy: Any = np.random.get_state(legacy=True)
    kind, keys, *numbers = numpy
    version, words, normal = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *numbers],
        "python": [version, torch.tensor(words), normal],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    kind, keys, *numbers = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *numbers))
    version, words, normal = states["python"]
    random.setstate((version, tuple(words.tolist()), normal))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
