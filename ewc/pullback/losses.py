"""Any loss as a function of a network and a batch, one value per example."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ewc.parameters import Parameters
from ewc.pullback.batches import Examples, check_dense
from ewc.pullback.call import Call

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a network and a batch to the negative log-likelihood of every example, ``[n]``."""


@dataclass(frozen=True)
class Place:
    """Stands for a column in the form of a batch."""

    index: int


@dataclass(frozen=True)
class LossCall(Call):
    """The call ``loss(model, batch)``; its outputs are the losses ``[n, 1]``.

    Attributes:
        loss: the function.
        form: the batch, with a :class:`Place` instead of every column.
        columns: tensors with one row per example, and lists with one item per example.
        names: the names of the columns in messages.
    """

    independence: ClassVar[str] = (
        "The Fisher information is a sum over examples: loss(model, batch) must return shape [n], "
        "one value per example that depends on that example alone, as with reduction='none'."
    )

    loss: Loss
    form: Any
    columns: tuple[Tensor | list[Any] | tuple[Any, ...], ...]
    names: tuple[str, ...]

    def batch(self) -> Any:
        """The batch of these examples."""
        return with_leaves(
            self.form, lambda leaf: self.columns[leaf.index] if isinstance(leaf, Place) else leaf
        )

    def result(self, model: nn.Module) -> Tensor:
        losses: Any = self.loss(model, self.batch())
        if isinstance(losses, Tensor) and losses.shape == (len(self),):
            return losses[:, None]
        kind = type(losses).__name__
        shown = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {kind}"
        raise ValueError(
            f"loss(model, batch) returned {shown} for n = {len(self)}: it must return a tensor of "
            "shape [n], one per example, as with reduction='none'."
        )

    def substituted(self, model: nn.Module, parameters: Parameters) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in parameters.items()}
        outputs: Tensor = functional_call(_LossNetwork(model, self), named, ())
        return outputs

    def map(self, function: Callable[[Tensor], Tensor]) -> "LossCall":
        def mapped(value: Any) -> Any:
            return with_leaves(value, lambda v: function(v) if isinstance(v, Tensor) else v)

        return replace(self, form=mapped(self.form), columns=tuple(map(mapped, self.columns)))

    def __getitem__(self, examples: slice | Tensor) -> "LossCall":
        return replace(self, columns=tuple(_rows(column, examples) for column in self.columns))

    def __len__(self) -> int:
        return len(self.columns[0])

    def walk(self) -> Iterator[Tensor]:
        tensors: list[Tensor] = []

        def kept(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(kept)
        return iter(tensors)

    def labelled(self) -> dict[str, Tensor]:
        pairs = zip(self.names, self.columns, strict=True)
        return {name: column for name, column in pairs if isinstance(column, Tensor)}

    @property
    def in_rows(self) -> bool:
        return len(self.labelled()) == len(self.tensors()) == len(self.columns)


class _LossNetwork(nn.Module):
    """A call of a loss as a module, so that the parameters of its network can be substituted."""

    def __init__(self, model: nn.Module, call: LossCall) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self) -> Tensor:
        return self.call.result(self.model)


class LossCaller:
    """Calls a loss with the batches of a data set.

    Args:
        loss: the function of the network and a batch.
        device: the device of the network's parameters.
    """

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self.loss = loss
        self.device = device

    def examples(self, batch: Any, index: int) -> Examples:
        """The examples of a batch, on the network's device.

        Args:
            batch: tensors with one row per example and lists with one item per example, in
                dicts, tuples and lists.  Numbers, strings and the like belong to all examples.
            index: the number of the batch, for messages.

        Raises:
            ValueError: the batch cannot be cut into examples.
        """
        check_dense((("a tensor of the batch", t) for t in _tensors_in(batch)), index)
        columns: list[Columns] = []
        faults: list[str] = []
        for count in possible_counts(batch):
            try:
                columns.append(Columns(batch, count))
            except ValueError as error:
                faults.append(str(error))
        if len(columns) != 1:
            reason = "its tensors and lists have no common length"
            if columns:
                counts = " or ".join(str(len(c.columns[0])) for c in columns)
                reason = f"it may have {counts} examples"
            elif len(faults) == 1:
                reason = faults[0]
            raise ValueError(
                f"Batch {index} cannot be cut into examples, because {reason}: every tensor must "
                "have a row and every list an item per example; a loss may transpose them, and a "
                "list of whole examples goes into a dict, {'examples': [...]}."
            )
        (found,) = columns
        call = LossCall(self.loss, found.form, tuple(found.columns), tuple(found.names))
        return Examples(call.map(lambda t: t.to(self.device, non_blocking=True)))


class Columns:
    """A batch taken apart into what has one entry per example.

    Args:
        batch: the batch.
        count: the number of its examples.

    Raises:
        ValueError: a tensor or a list in the batch has another length.
    """

    def __init__(self, batch: Any, count: int) -> None:
        self.count = count
        self.columns: list[Any] = []
        self.names: list[str] = []
        self.form = self._form(batch, "batch")

    def _form(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor) and value.dim():
            if len(value) != self.count:
                raise ValueError(
                    f"{name} has shape {list(value.shape)} beside {self.count} examples"
                )
            return self._placed(value, name)
        # The batch itself is no list of examples, but of its fields.
        if isinstance(value, list | tuple) and name != "batch" and self._has_items(value, name):
            return self._placed(value, name)
        return with_entries(value, lambda key, v: self._form(v, f"{name}[{key!r}]"))

    def _placed(self, column: Any, name: str) -> Place:
        self.columns.append(column)
        self.names.append(name)
        return Place(len(self.columns) - 1)

    def _has_items(self, values: list[Any] | tuple[Any, ...], name: str) -> bool:
        """Whether a list has one item per example; else it is a list of columns."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(values) != self.count:
            if values and not _tensors_in(values):
                raise ValueError(f"{name} has {len(values)} items beside {self.count} examples")
            return False
        if len(tensors) < len(values):
            return not tensors
        in_rows = all(tensor.dim() and len(tensor) == self.count for tensor in tensors)
        if in_rows and self.count > 1:
            raise ValueError(
                f"{name} holds {self.count} tensors of {self.count} rows, items or columns (take "
                "another batch size)"
            )
        return not in_rows


def possible_counts(batch: Any) -> list[int]:
    """The numbers of examples that a batch may have: one if a field of it is a tensor."""
    fields = _fields(batch)
    direct = [len(value) for value in fields if isinstance(value, Tensor) and value.dim()]
    if direct:
        return direct[:1]
    counts: set[int] = set()
    for value in fields:
        if isinstance(value, list | tuple):
            counts |= {len(value), *(len(t) for t in _tensors_in(value) if t.dim())}
    return sorted(counts)


def _fields(batch: Any) -> list[Any]:
    """The fields of a batch, through all dicts."""
    if isinstance(batch, list | tuple):
        entries = list(batch)
    elif isinstance(batch, Mapping):
        entries = list(batch.values())
    else:
        return [batch]
    return [
        field
        for entry in entries
        for field in (_fields(entry) if isinstance(entry, Mapping) else [entry])
    ]


def _tensors_in(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    with_leaves(value, lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None)
    return tensors


def _rows(column: Any, examples: slice | Tensor) -> Any:
    if isinstance(column, Tensor) or isinstance(examples, slice):
        return column[examples]
    return [column[i] for i in examples.tolist()]


def with_entries(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """A dict, list or tuple with ``function`` applied to keys and entries; others unchanged."""
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        result.update({key: function(key, entry) for key, entry in value.items()})
        return result
    if isinstance(value, Mapping):
        return {key: function(key, entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        entries = [function(place, entry) for place, entry in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def with_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with ``function`` applied to all else."""
    if isinstance(value, Mapping | tuple | list):
        return with_entries(value, lambda _, entry: with_leaves(entry, function))
    return function(value)
