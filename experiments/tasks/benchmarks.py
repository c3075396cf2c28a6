"""Streams of tasks from images in memory.

A task is an index and a permutation of shared tensors, so ten permuted tasks need the memory of
one.  A batch is two indexing operations.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLScenario
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import EagerCLStream
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from torch import Tensor
from torch.utils.data import Dataset

from ewc.checks import check_count
from experiments.tasks.images import Digits, Images, ImageSource

Scenario = Literal["task", "domain", "class"]
"""The scenario (van de Ven and Tolias 2019, arXiv:1904.07734): at test time the task is known,
does not matter, or must be inferred along with the class."""


class TaskData(Dataset[tuple[Tensor, ...]]):
    """The images of one task, as a view of shared tensors.

    Args:
        images: the shared images.
        labels: the labels of this task, ``[n]``.
        index: the indices of the task's images, ``[n]``; ``None`` for all.
        permutation: the order of the pixels; ``None`` for the original order.
        task: the task label of every batch; ``None`` where the task is not known.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        index: Tensor | None,
        permutation: Tensor | None,
        task: int | None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.index = index
        self.permutation = permutation
        self.task = task

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        """One image and its label, for plugins that use a data loader."""
        x, y, *_ = self.batch(torch.tensor([i], device=self.labels.device))
        return x[0], y[0]

    def batch(self, rows: Tensor) -> list[Tensor]:
        """The images and labels of ``rows``, and the task labels where the task is known."""
        pixels = self.images.pixels[rows if self.index is None else self.index[rows]]
        if self.permutation is not None:
            pixels = pixels.index_select(1, self.permutation)
        if self.task is None:
            return [pixels, self.labels[rows]]
        return [pixels, self.labels[rows], torch.full_like(rows, self.task)]


class TaskExperience(DatasetExperience):
    """An experience of Avalanche over one task.

    Attributes:
        data: the task's images, for loaders that cut batches by index.
        classes_in_this_experience: the labels that occur.
        task_labels: the task's label, only where the task is known (Avalanche checks it by
            ``hasattr``).
    """

    def __init__(self, data: TaskData, number: int) -> None:
        labels = data.labels.tolist()
        attributes = [DataAttribute(labels, "targets")]
        if data.task is not None:
            self.task_labels = [data.task]
            tasks = [data.task] * len(labels)
            attributes.append(DataAttribute(tasks, "targets_task_labels", use_in_getitem=True))
        super().__init__(
            dataset=AvalancheDataset([data], data_attributes=attributes),
            current_experience=number,
        )
        self.data = data
        self.classes_in_this_experience = sorted(set(labels))


@dataclass(frozen=True)
class Tasks:
    """A benchmark that has been built.

    Attributes:
        scenario: Avalanche's benchmark, with streams ``train`` and ``test``.
        num_pixels: the size of an input.
        num_outputs: the outputs of the network, per head if there are several.
        num_heads: the heads, one per task; ``None`` for one head shared by all.
    """

    scenario: CLScenario
    num_pixels: int
    num_outputs: int
    num_heads: int | None


@dataclass(frozen=True)
class Benchmark(ABC):
    """A way of making tasks from images.

    Attributes:
        images: the source of the images.
        num_tasks: the number of tasks.
        scenario: ``task`` (one head per task, the task is known), ``domain`` (one head, the same
            labels in every task) or ``class`` (one head, all classes).

    Raises:
        ValueError: there is no task.
    """

    images: ImageSource = field(default_factory=Digits)
    num_tasks: int = 5
    scenario: Scenario = "domain"

    def __post_init__(self) -> None:
        """Check the number of tasks."""
        check_count(self.num_tasks, "num_tasks")

    @property
    @abstractmethod
    def classes_per_task(self) -> int:
        """The number of classes per task."""

    @abstractmethod
    def plan(self, generator: torch.Generator) -> list[tuple[list[int], Tensor | None]]:
        """Per task its classes, in the order of their labels, and its permutation."""

    def build(self, data_root: Path, seed: int, device: torch.device) -> Tasks:
        """Load the images and make the tasks; the same seed gives the same tasks.

        Raises:
            FileNotFoundError: the images are missing.
        """
        train, test = (images.to(device) for images in self.images.load(data_root))
        plan = self.plan(torch.Generator().manual_seed(seed))
        streams = [
            EagerCLStream(name, [self._experience(images, *task, i) for i, task in enumerate(plan)])
            for name, images in (("train", train), ("test", test))
        ]
        shared = self.num_tasks if self.scenario == "class" else 1
        return Tasks(
            CLScenario(streams),
            self.images.num_pixels,
            self.classes_per_task * shared,
            self.num_tasks if self.scenario == "task" else None,
        )

    def _experience(
        self, images: Images, classes: list[int], permutation: Tensor | None, number: int
    ) -> TaskExperience:
        device = images.labels.device
        new_label = torch.full((self.images.num_classes,), -1, device=device)
        first = number * self.classes_per_task if self.scenario == "class" else 0
        new_label[classes] = torch.arange(first, first + len(classes), device=device)
        labels = new_label[images.labels]
        index = None
        if len(classes) < self.images.num_classes:
            index = torch.nonzero(labels >= 0)[:, 0]
            labels = labels[index]
        if permutation is not None:
            permutation = permutation.to(device)
        task = number if self.scenario == "task" else None
        return TaskExperience(TaskData(images, labels, index, permutation, task), number)


@dataclass(frozen=True)
class Split(Benchmark):
    """Disjoint classes per task, shuffled by the seed.

    Raises:
        ValueError: the classes cannot be split evenly, with two or more per task.
    """

    def __post_init__(self) -> None:
        """Check that the classes can be split evenly."""
        super().__post_init__()
        classes = self.images.num_classes
        allowed = [n for n in range(1, classes // 2 + 1) if classes % n == 0]
        if self.num_tasks not in allowed:
            raise ValueError(
                f"num_tasks must be {', '.join(map(str, allowed))} for {classes} classes, got "
                f"{self.num_tasks}."
            )

    @property
    def classes_per_task(self) -> int:
        """An equal share of the classes."""
        return self.images.num_classes // self.num_tasks

    def plan(self, generator: torch.Generator) -> list[tuple[list[int], Tensor | None]]:
        """Equal shares of the shuffled classes."""
        order: list[Any] = torch.randperm(self.images.num_classes, generator=generator).tolist()
        size = self.classes_per_task
        return [(order[i * size : (i + 1) * size], None) for i in range(self.num_tasks)]


@dataclass(frozen=True)
class Permuted(Benchmark):
    """One permutation of the pixels per task; the first task keeps their order.

    Attributes:
        square: the side of the central square within which pixels are shuffled; ``None`` for the
            whole image.  Its difference from the side of the image must be even.

    Raises:
        ValueError: no such square is in the middle of the image.
    """

    square: int | None = None

    def __post_init__(self) -> None:
        """Check that the square is in the middle."""
        super().__post_init__()
        side = math.isqrt(self.images.num_pixels)
        allowed = list(range(side, 0, -2))
        if self.square is not None and self.square not in allowed:
            raise ValueError(
                f"square must be {', '.join(map(str, reversed(allowed)))} in the middle of "
                f"{side}x{side} pixels, got {self.square}."
            )

    @property
    def classes_per_task(self) -> int:
        """All classes."""
        return self.images.num_classes

    def plan(self, generator: torch.Generator) -> list[tuple[list[int], Tensor | None]]:
        """All classes, with one random permutation per task."""
        classes = list(range(self.images.num_classes))
        pixels = torch.arange(self.images.num_pixels)
        side = math.isqrt(len(pixels))
        inside = pixels.view(side, side) if self.square is not None else pixels
        if self.square is not None:
            edge = (side - self.square) // 2
            inside = inside[edge : side - edge, edge : side - edge]
        inside = inside.flatten()
        shuffled = []
        for _ in range(self.num_tasks - 1):
            permutation = pixels.clone()
            permutation[inside] = inside[torch.randperm(len(inside), generator=generator)]
            shuffled.append(permutation)
        return [(classes, permutation) for permutation in (None, *shuffled)]
