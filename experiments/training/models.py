"""The networks of the experiments."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

from ewc.checks import shown


class Network(ABC):
    """A network of the experiments: a body, and the heads that a benchmark asks for."""

    @abstractmethod
    def body(self, num_inputs: int) -> tuple[nn.Sequential, int]:
        """The layers below the head, and the number of their outputs.

        Args:
            num_inputs: the size of an input; the body gets ``[n, num_inputs]``.
        """

    def build(self, num_inputs: int, num_outputs: int, num_heads: int | None) -> nn.Module:
        """The network, with one head, or with ``num_heads`` for known tasks.

        Raises:
            TypeError: :meth:`body` returns something else than it should.
        """
        made = self.body(num_inputs)
        if not (isinstance(made, tuple) and [*map(type, made)] == [nn.Sequential, int]):
            raise TypeError(
                f"{type(self).__name__}.body() must return an nn.Sequential and the number of its "
                f"outputs, got {shown(made)}."
            )
        body, num_features = made
        if num_heads is None:
            return nn.Sequential(*body, nn.Linear(num_features, num_outputs))
        return MultiHead(body, num_features, num_outputs, num_heads)


@dataclass(frozen=True)
class MLP(Network):
    """A fully connected network with ReLU.

    Attributes:
        hidden: the widths of the hidden layers.
        dropout: the fraction of hidden units that is dropped in training.
        input_dropout: the fraction of pixels that is dropped in training.

    Raises:
        ValueError: a width is below 1, or a fraction is not in [0, 1).
    """

    hidden: list[int] = field(default_factory=lambda: [400, 400])
    dropout: float = 0.0
    input_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must hold widths of 1 or more, got {shown(self.hidden)}.")
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")

    def body(self, num_inputs: int) -> tuple[nn.Sequential, int]:
        """The hidden layers."""
        layers: list[nn.Module] = [nn.Dropout(self.input_dropout)] if self.input_dropout else []
        for width in self.hidden:
            layers += [nn.Linear(num_inputs, width), nn.ReLU()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            num_inputs = width
        return nn.Sequential(*layers), num_inputs


class MultiHead(MultiTaskModule):
    """A shared body with one linear head per task.

    Args:
        body: maps ``[n, ...]`` to ``[n, num_features]``.
        num_features: the outputs of the body.
        num_outputs: the outputs of every head.
        num_heads: the number of tasks.
    """

    def __init__(
        self, body: nn.Module, num_features: int, num_outputs: int, num_heads: int
    ) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(num_features, num_outputs) for _ in range(num_heads))

    def forward(self, x: Tensor, task_labels: Tensor | None) -> Any:
        """The outputs ``[n, num_outputs]``, per example from the head of its task.

        Without task labels it is the outputs of every head, by task, for Avalanche's distillation.
        """
        features = self.body(x)
        if task_labels is None:
            return {task: head(features) for task, head in enumerate(self.heads)}
        tasks = torch.unique(task_labels).tolist()
        if len(tasks) == 1:
            alone: Tensor = self.heads[tasks[0]](features)
            return alone
        first: Tensor = self.heads[tasks[0]](features)
        outputs = first
        for task in tasks[1:]:
            is_of_task = (task_labels == task)[:, None]
            outputs = torch.where(is_of_task, self.heads[task](features), outputs)
        return outputs
