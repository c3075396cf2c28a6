"""The arguments of a network: tensors, or dicts of tensors, with one row per example."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ewc.parameters import Parameters
from ewc.pullback.call import Call, listed_shapes, outputs_of
from ewc.wrappers import bare

NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
"""The kinds of arguments that can be passed by name."""


@dataclass(frozen=True)
class Arguments(Call):
    """The arguments of one call of the model, for a set of examples.

    As the ``x`` of a batch ``(x, y)`` they define how the model is called, whatever its
    signature.

    Attributes:
        positional: tensors, or dicts of tensors.
        named: tensors that are passed by name.
    """

    positional: tuple[Tensor | dict[str, Tensor], ...]
    named: dict[str, Tensor] = field(default_factory=dict)

    def result(self, model: nn.Module) -> Tensor:
        return outputs_of(model(*self.positional, **self.named))

    def substituted(self, model: nn.Module, parameters: Parameters) -> Tensor:
        return outputs_of(functional_call(model, parameters, self.positional, self.named))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Arguments":
        positional = tuple(
            function(value)
            if isinstance(value, Tensor)
            else {key: function(tensor) for key, tensor in value.items()}
            for value in self.positional
        )
        return Arguments(positional, {key: function(t) for key, t in self.named.items()})

    def __getitem__(self, examples: slice | Tensor) -> "Arguments":
        return self.map(lambda tensor: tensor[examples])

    def __len__(self) -> int:
        return len(next(self.walk()))

    def walk(self) -> Iterator[Tensor]:
        for value in self.positional:
            yield from (value,) if isinstance(value, Tensor) else value.values()
        yield from self.named.values()

    def labelled(self) -> dict[str, Tensor]:
        several = len(self.positional) + len(self.named) > 1
        tensors: dict[str, Tensor] = {}
        for place, value in enumerate(self.positional):
            label = f"argument {place + 1}" if several else "x"
            if isinstance(value, dict):
                tensors |= {f"{label}[{key!r}]": tensor for key, tensor in value.items()}
            else:
                tensors[label] = value
        return tensors | {f"x[{name!r}]": tensor for name, tensor in self.named.items()}


class Caller:
    """Calls a model with the batches of a data set.

    Args:
        model: the network.
        device: the device of its parameters.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        inner: Any = bare(model)
        self.name = f"{type(inner).__name__}.forward"
        self.device = device
        parameters = list(signature(inner.forward).parameters.values())
        self.names = [p.name for p in parameters if p.kind in NAMED]
        self.any_name = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        self.required = [p.name for p in parameters if p.kind in NAMED and p.default is p.empty]
        positional = [
            p
            for p in parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        ]
        # ``*args`` takes any number of arguments, so the task labels are passed too.
        self.may_have_task = bool(positional) and positional[0].kind is Parameter.VAR_POSITIONAL
        second = positional[1] if len(positional) > 1 else None
        # The task labels go to a second argument that has no default or this name.
        self.needs_task = (
            second is not None
            and second.default is Parameter.empty
            and second.kind is not Parameter.VAR_POSITIONAL
        )
        self.task_name = second.name if second is not None else ""
        if self.needs_task or self.task_name == "task_labels":
            self.may_have_task = True

    def arguments(self, batch: Any, index: int) -> tuple[Arguments, Tensor]:
        """The model's arguments and the targets of a batch, on the model's device.

        Args:
            batch: ``(x, y)`` or ``(x, y, task)``.  ``x`` may be a dict of tensors.  It is
                passed by name if the model has arguments of these names, else as one
                argument.  ``x`` may also be :class:`Arguments`, which are used unchanged.
            index: the number of the batch, for messages.

        Raises:
            ValueError: the batch is something else, its lengths differ, or its names are
                not those of the model's arguments.
        """
        if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
            raise ValueError(self._not_a_batch(batch, index))
        x, y, *task = batch
        if not isinstance(x, Arguments):
            x = Arguments((dict(x) if isinstance(x, Mapping) else x,))
        tensors = x.labelled() | dict(zip(("y", "task"), batch[1:], strict=False))
        if len(tensors) < len(batch) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError(self._not_a_batch(batch, index))
        if len({t.shape[0] if t.dim() else -1 for t in tensors.values()}) != 1 or not y.dim():
            shapes = listed_shapes(tensors)
            hint = "" if y.dim() else "; put single examples into batches by a DataLoader"
            raise ValueError(
                f"Batch {index} has {shapes}: the first dimensions, which count the examples, "
                f"must be equal{hint}."
            )
        if not isinstance(batch[0], Arguments):
            x = self._call(x.positional[0], task, index)
        moved = x.map(lambda t: t.to(self.device, non_blocking=True))
        return moved, y.to(self.device, non_blocking=True)

    def _call(self, x: Tensor | dict[str, Tensor], task: list[Tensor], index: int) -> Arguments:
        """The arguments for these inputs and, if given, task labels."""
        if isinstance(x, dict) and self._goes_by_name(x, index):
            return Arguments((), x)
        if self.needs_task and not task:
            raise ValueError(
                f"Batch {index} is (x, y), but {self.name} also needs {self.task_name!r}: "
                f"data must be batches (x, y, {self.task_name})."
            )
        return Arguments((x, *task) if self.may_have_task else (x,))

    def _goes_by_name(self, inputs: dict[str, Tensor], index: int) -> bool:
        """Whether the names in a dict are those of the model's arguments.

        Raises:
            ValueError: only some of them are.
        """
        missing = [name for name in self.required if name not in inputs]
        unknown = [] if self.any_name else [key for key in inputs if key not in self.names]
        if not missing and not unknown:
            return True
        # A model of one argument may take a dict, even one with a key of the argument's name.
        if len(self.names) > 1 and not inputs.keys().isdisjoint(self.names):
            fault = f"has the unknown input {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
            raise ValueError(
                f"Batch {index} {fault}: {self.name} takes {', '.join(map(repr, self.names))}."
            )
        return False

    @staticmethod
    def _not_a_batch(batch: Any, index: int) -> str:
        kind = type(batch).__name__
        if isinstance(batch, list | tuple):
            kind += f" ({', '.join(type(item).__name__ for item in batch)})"
            if len(batch) in (2, 3) and isinstance(batch[0], Mapping):
                odd = [key for key, t in batch[0].items() if not isinstance(t, Tensor)]
                if odd:
                    kind += f", whose x[{odd[0]!r}] is a {type(batch[0][odd[0]]).__name__}"
        hint = ""
        if isinstance(batch, Tensor):
            hint = "; a single batch goes into a list, [(x, y)]"
        elif isinstance(batch, Mapping):
            hint = "; take the targets out of the dict"
        return (
            f"Batch {index} is a {kind}: data must be batches of tensors (x, y) or "
            f"(x, y, task), where x may be a dict of tensors{hint}."
        )
