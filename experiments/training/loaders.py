"""Avalanche's strategies over images in memory, with batches cut by index.

Avalanche's loaders fetch single examples, which costs more than a training step of a small network.
These templates replace only the loaders; everything else, also the plugins' hooks, is Avalanche's.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from avalanche.training import Naive
from torch import Tensor

from experiments.tasks.benchmarks import TaskData
from experiments.training.progress import RunProgress
from experiments.training.resume import Boundary


class TrainingBatches:
    """Shuffled batches over one or more tasks, for a number of iterations.

    Every image comes once per epoch; the last batch of an epoch may be smaller.

    Args:
        tasks: the images.
        batch_size: the images in a batch.
        iterations: the number of batches.
        generator: the generator for shuffling, on the CPU.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        batch_size: int,
        iterations: int,
        generator: torch.Generator,
    ) -> None:
        self.tasks = tasks
        self.batch_size = batch_size
        self.iterations = iterations
        self.generator = generator

    def __len__(self) -> int:
        """The number of batches."""
        return self.iterations

    def __iter__(self) -> Iterator[list[Tensor]]:
        """The batches: images, labels, and task labels where the task is known."""
        return self.after(0)

    def after(self, first: int) -> Iterator[list[Tensor]]:
        """The batches without the first ones, with the generator as if they had been given."""
        sizes = [len(task) for task in self.tasks]
        device = self.tasks[0].labels.device
        given = 0
        while given < self.iterations:
            order = torch.randperm(sum(sizes), generator=self.generator).to(device)
            for rows in torch.split(order, self.batch_size):
                if given == self.iterations:
                    return
                given += 1
                if given > first:
                    yield self._batch(rows, sizes)

    def _batch(self, rows: Tensor, sizes: list[int]) -> list[Tensor]:
        if len(self.tasks) == 1:
            return self.tasks[0].batch(rows)
        batches, start = [], 0
        for task, size in zip(self.tasks, sizes, strict=True):
            task_rows = rows[(rows >= start) & (rows < start + size)] - start
            if len(task_rows):
                batches.append(task.batch(task_rows))
            start += size
        return [torch.cat(column) for column in zip(*batches, strict=True)]


class EvaluationBatches:
    """The images of one task in order, without shuffling."""

    def __init__(self, task: TaskData, batch_size: int) -> None:
        self.task = task
        self.batch_size = batch_size

    def __len__(self) -> int:
        """The number of batches."""
        return math.ceil(len(self.task) / self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        """The batches."""
        rows = torch.arange(len(self.task), device=self.task.labels.device)
        for batch_rows in torch.split(rows, self.batch_size):
            yield self.task.batch(batch_rows)


class InMemoryNaive(Naive):
    """Fine-tuning on each task in turn.

    Args:
        iterations: training steps per task; ``None`` to train for ``epochs``.
        epochs: the epochs per task.
        fisher_batch_size: the images in a batch of a pass over a task within training, such as that
            for the Fisher information.
        seed: the seed for shuffling.
        boundary: what happens between two training steps, checkpoints for one.
        progress: the bar that passes over a task move.
        options: the arguments of Avalanche's template.
    """

    dataloader: Any

    def __init__(
        self,
        *,
        iterations: int | None,
        epochs: int,
        fisher_batch_size: int,
        seed: int,
        boundary: Boundary | None = None,
        progress: RunProgress | None = None,
        **options: Any,
    ) -> None:
        super().__init__(train_epochs=1, **options)
        self.boundary = boundary
        self.progress = progress
        self.iterations = iterations
        self.epochs = epochs
        self.fisher_batch_size = fisher_batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def training_tasks(self, experience: Any) -> list[TaskData]:
        """The tasks in training with an experience."""
        return [experience.data]

    def num_steps(self, experience: Any) -> int:
        """The training steps with an experience."""
        size = sum(len(task) for task in self.training_tasks(experience))
        return self.iterations or self.epochs * math.ceil(size / self.train_mb_size)

    def make_train_dataloader(self, **_: Any) -> None:
        """Batches by index in place of Avalanche's loader."""
        tasks, steps = self.training_tasks(self.experience), self.num_steps(self.experience)
        self.dataloader = TrainingBatches(tasks, self.train_mb_size, steps, self.generator)

    def training_epoch(self, **options: Any) -> None:
        """Avalanche's loop over the steps, without those that an earlier process has done."""
        batches = self.dataloader
        if self.boundary:
            self.dataloader = self._between(batches, self.boundary)
        super().training_epoch(**options)
        self.dataloader = batches

    def _between(self, batches: TrainingBatches, boundary: Boundary) -> Iterator[list[Tensor]]:
        """The batches; the boundary is reached when the loop asks for the next one."""
        first = boundary.start(self)
        boundary.reached(self)
        for batch in batches.after(first):
            yield batch
            boundary.reached(self)

    def make_eval_dataloader(self, **_: Any) -> None:
        """Batches by index in place of Avalanche's loader."""
        # The rounding of what training uses must not depend on how the evaluation is cut.
        size = self.fisher_batch_size if self.is_training else self.eval_mb_size
        batches = EvaluationBatches(self.experience.data, size)
        kind = "Fisher pass" if self.is_training else "evaluation"
        self.dataloader = self.progress.watched(batches, kind) if self.progress else batches


class InMemoryJoint(InMemoryNaive):
    """Training on the images of all tasks so far: the upper reference.

    The network and the number of iterations per task are those of fine-tuning.
    """

    def training_tasks(self, experience: Any) -> list[TaskData]:
        """The task of the experience and all before it."""
        stream = experience.logging().origin_stream
        number = experience.logging().current_experience
        return [experience.data for experience in stream[: number + 1]]
