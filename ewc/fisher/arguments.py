"""What a network is called with: tensors, or dicts of tensors, a row an example."""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, for some examples.

    Attributes:
        positional: tensors, or dicts of tensors.
        named: tensors that go by name.
    """

    positional: tuple[Tensor | dict[str, Tensor], ...]
    named: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> Any:
        """What the model returns for a copy of them: it may write into its input."""
        own = self.map(torch.clone)
        return model(*own.positional, **own.named)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Arguments":
        """The same with ``function`` applied to every tensor."""
        positional = tuple(
            function(value)
            if isinstance(value, Tensor)
            else {key: function(tensor) for key, tensor in value.items()}
            for value in self.positional
        )
        return Arguments(positional, {key: function(t) for key, t in self.named.items()})

    def __getitem__(self, examples: slice) -> "Arguments":
        """The arguments of some examples, as views."""
        return self.map(lambda tensor: tensor[examples])

    def __len__(self) -> int:
        """The number of examples."""
        return len(next(self._walk()))

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return list(self._walk())

    def with_tensors(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> "Arguments":
        """The same arguments with other tensors, in the order of :meth:`tensors`."""
        following = iter(tensors)
        return self.map(lambda _: next(following))

    def _walk(self) -> Iterator[Tensor]:
        for value in self.positional:
            yield from (value,) if isinstance(value, Tensor) else value.values()
        yield from self.named.values()


class Caller:
    """Knows how a model is called with the batches of a data set.

    Args:
        model: the network.
        device: where its parameters are.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner: Any = model.module if wrapped else model
        self.name = type(model).__name__
        self.device = device
        parameters = list(signature(inner.forward).parameters.values())
        self.names = {p.name for p in parameters if p.kind is not Parameter.VAR_KEYWORD}
        self.any_name = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        self.required = {p.name for p in parameters if p.kind in named and p.default is p.empty}
        positional = [
            p
            for p in parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        ]
        # Of such arguments nothing is known: whatever the batch has goes in.
        self.may_have_task = bool(positional) and positional[0].kind is Parameter.VAR_POSITIONAL
        second = positional[1] if len(positional) > 1 else None
        # A second argument without a default: task labels, as in Avalanche's models. With
        # a dict, arguments without a default are its own.
        self.with_task = second is not None and (
            (second.default is Parameter.empty and second.kind is not Parameter.VAR_POSITIONAL)
            or second.name == "task_labels"
        )

    def arguments(self, batch: Any, index: int) -> tuple[Arguments, Tensor]:
        """The model's arguments and the targets of a batch, on the model's device.

        Args:
            batch: ``(x, y)`` or ``(x, y, task)``; ``x`` may be a dict of tensors, which
                goes by name to a model that has arguments of these names, else as it is.
            index: the number of the batch, for messages.

        Raises:
            ValueError: the batch is something else, or its lengths differ.
        """
        if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
            raise ValueError(self._no_batch(batch, index))
        x, *others = batch
        inputs = dict(x) if isinstance(x, Mapping) else {"": x}
        tensors = [*inputs.values(), *others]
        if not inputs or not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError(self._no_batch(batch, index))
        if len({t.shape[0] if t.dim() else -1 for t in tensors}) != 1 or not tensors[0].dim():
            raise ValueError(
                f"Batch {index} has tensors of shapes {[list(t.shape) for t in tensors]}: "
                "their first dimensions, the examples, must be equal."
            )
        by_name = "" not in inputs and self._takes(inputs.keys())
        with_task = self.with_task and not by_name
        if with_task and len(others) == 1:
            raise ValueError(
                f"Batch {index} is (x, y), but {self.name} takes task "
                "labels: the data must be batches (x, y, task)."
            )
        y, *task = (t.to(self.device, non_blocking=True) for t in others)
        inputs = {key: t.to(self.device, non_blocking=True) for key, t in inputs.items()}
        if by_name:
            return Arguments((), inputs), y
        first = inputs.get("", inputs)
        with_task = with_task or self.may_have_task
        return Arguments((first, *task) if with_task else (first,)), y

    def _takes(self, names: Set[str]) -> bool:
        """Whether the model's arguments have these names."""
        return names <= self.names or (self.any_name and self.required <= names)

    @staticmethod
    def _no_batch(batch: Any, index: int) -> str:
        found = type(batch).__name__
        if isinstance(batch, list | tuple):
            found += f" ({', '.join(type(item).__name__ for item in batch)})"
        return (
            f"Batch {index} is a {found}: the data must be batches of tensors (x, y) or "
            "(x, y, task), where x may be a dict of tensors."
        )
