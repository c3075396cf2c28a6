"""What a run has measured so far, and where the task in training began."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from ewc import FisherMatrix
from ewc.parameters import flatten
from ewc.statistics import fisher_overlap_by_layer
from experiments.training.information import described


@dataclass
class Course:
    """What a run has measured so far, and where the task in training began.

    Attributes:
        initial: the accuracies of the untrained network, one for each task.
        matrix: the accuracies, one row for each task learnt.
        information: what is kept of each task's Fisher information.
        overlaps: for each task the overlap of its Fisher information with that of the first, by
            layer.
        train_seconds: the time of training steps.
        fisher_seconds: the time of passes for the Fisher information.
        eval_seconds: the time of evaluations.
    """

    initial: list[float] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    information: list[dict[str, Any]] = field(default_factory=list)
    overlaps: list[dict[str, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    fisher_seconds: float = 0.0
    eval_seconds: float = 0.0
    _earlier_seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter)
    _first: FisherMatrix | None = None
    _start: Tensor | None = None

    def begin(self, model: nn.Module, *, goes_on: bool) -> None:
        """Note the parameters before a task, unless a checkpoint has them as the task goes on."""
        if not goes_on:
            self._start = _parameters(model)

    def drift(self, model: nn.Module) -> float:
        """The distance of the parameters from those before the task."""
        assert self._start is not None
        return float((_parameters(model) - self._start).norm())

    def overlap(self, fisher: FisherMatrix) -> dict[str, float]:
        """The overlap of a task's Fisher information with that of the first task, by layer."""
        self._first = self._first or fisher
        self.overlaps.append(fisher_overlap_by_layer(self._first, fisher))
        return self.overlaps[-1]

    def describe(self, fisher: FisherMatrix, seconds: float) -> dict[str, Any]:
        """Keep and return what is kept of a task's Fisher information, which took some seconds."""
        self.information.append(described(fisher, seconds))
        return self.information[-1]

    @property
    def seconds(self) -> dict[str, float]:
        """The time of each part and in total, over all processes of the run."""
        total = self._earlier_seconds + time.perf_counter() - self._started
        parts = {"train": self.train_seconds, "fisher": self.fisher_seconds}
        parts |= {"eval": self.eval_seconds, "total": total}
        return {name: round(value, 3) for name, value in parts.items()}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        first = None
        if self._first is not None:
            tensors, about = self._first.description()
            first = {"tensors": tensors, "about": about}
        return {
            "initial": self.initial,
            "matrix": self.matrix,
            "information": self.information,
            "overlaps": self.overlaps,
            "seconds": [self.train_seconds, self.fisher_seconds, self.eval_seconds],
            "total": self._earlier_seconds + time.perf_counter() - self._started,
            "first": first,
            "start": self._start,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], model: nn.Module) -> Self:
        """The course whose :meth:`state` this is, on the device of a model."""
        device = next(model.parameters()).device
        first = None
        if state["first"] is not None:
            described = state["first"]["tensors"], state["first"]["about"]
            first = FisherMatrix.from_description(*described).to(device).attached(model)
        start = None if state["start"] is None else state["start"].to(device)
        measured = {name: state[name] for name in ("initial", "matrix", "information", "overlaps")}
        course = cls(**measured, _earlier_seconds=state["total"])
        course.train_seconds, course.fisher_seconds, course.eval_seconds = state["seconds"]
        course._first, course._start = first, start
        return course


def _parameters(model: nn.Module) -> Tensor:
    return flatten(dict(model.named_parameters())).detach()
