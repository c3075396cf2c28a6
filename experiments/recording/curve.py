"""What a picture needs of a long run's steps, in bounded memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field

CURVES = ("train/loss", "train/penalty")
"""The metrics of a step that are drawn."""

MOST = 800
"""The largest number of points of a curve; a picture is about as many pixels wide."""


@dataclass(frozen=True)
class Point:
    """The mean of some records in a row.

    Attributes:
        step: the step of the last of them.
        means: the mean of each metric, by name.
    """

    step: float
    means: Mapping[str, float]

    def joined(self, after: "Point") -> "Point":
        """The mean of this point and the next, which is of as many records."""
        return Point(after.step, {k: (self.means[k] + after.means[k]) / 2 for k in CURVES})


@dataclass
class Curve:
    """The means of metrics over the training steps.

    Each point is of ``width`` records.  Neighbours are joined when there are too many points, so
    a run of any length takes the same memory.

    Attributes:
        points: the points so far, without the records of the one that is not complete.
        width: the records of a point.
        starts: the first step of every task but the first.
        pull: the largest gradient of the penalty relative to that of the task's loss, as a ratio
            of norms; 0 before a record has both.
    """

    points: list[Point] = field(default_factory=list)
    width: int = 1
    starts: list[float] = field(default_factory=list)
    pull: float = 0.0
    _task: float | None = None
    _open: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, record: Mapping[str, float]) -> None:
        """Add the record of a step."""
        task = record.get("task", self._task)
        if self._task not in (None, task):
            self.starts.append(record["step"])
        self._task = task
        if norm := record.get("train/task_gradient_norm"):
            self.pull = max(self.pull, record.get("train/penalty_gradient_norm", 0.0) / norm)
        self._open.append({name: float(record[name]) for name in CURVES})
        if len(self._open) < self.width:
            return
        means = {k: sum(r[k] for r in self._open) / self.width for k in CURVES}
        self.points.append(Point(record["step"], means))
        self._open = []
        if len(self.points) == MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [first.joined(second) for first, second in pairs]
            self.width *= 2
