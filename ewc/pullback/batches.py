"""From the batches of a data set to calls of a model."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ewc.checks import check_has_numbers
from ewc.linalg.devices import sizes_for
from ewc.pullback.arguments import Arguments
from ewc.pullback.call import Call, listed_shapes
from ewc.wrappers import bare

NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
"""The kinds of arguments that can be passed by name."""

LABELS, WEIGHTS = "labels", "weights"
"""The keys of a batch's targets and of its sample weights, if it is a dict."""


@dataclass(frozen=True)
class Examples:
    """A set of examples.

    Attributes:
        arguments: the call of the model.
        targets: the observed targets, one row per example; ``None`` if the batch has none.
        weights: the sample weights ``[n]`` or ``[n, *positions]``, 0 or above; ``None`` if
            all are 1.
    """

    arguments: Call
    targets: Tensor | None = None
    weights: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "Examples":
        """Some of the examples."""
        targets, weights = (None if t is None else t[rows] for t in (self.targets, self.weights))
        return Examples(self.arguments[rows], targets, weights)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.arguments)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Examples":
        """The same examples with ``function`` applied to every tensor."""
        targets, weights = (
            None if t is None else function(t) for t in (self.targets, self.weights)
        )
        return Examples(self.arguments.map(function), targets, weights)


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
        self.rest = next((p.name for p in parameters if p.kind is Parameter.VAR_KEYWORD), "")
        self.any_name = bool(self.rest)
        self.required = [p.name for p in parameters if p.kind in NAMED and p.default is p.empty]
        self.positional = [
            p
            for p in parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        ]
        # ``*args`` takes any number of arguments, so the task labels are passed too.
        self.any_number = [p.kind for p in self.positional[:1]] == [Parameter.VAR_POSITIONAL]

    def examples(self, batch: Any, index: int) -> Examples:
        """The examples of a batch, on the model's device.

        Args:
            batch: ``(x, y)``, ``(x, y, ..., task)`` or a dict, as
                :func:`~ewc.fisher_information` describes them.
            index: the number of the batch, for messages.

        Raises:
            ValueError: the batch is something else, its lengths differ, its names are not
                those of the model's arguments, its tensors are not dense, its targets are
                complex, or a weight is negative or not finite.
        """
        examples, tensors = (
            self._of_dict(batch, index)
            if isinstance(batch, Mapping)
            else self._of_fields(batch, index)
        )
        check_dense(tensors.items(), index)
        if examples.targets is not None and examples.targets.is_complex():
            raise ValueError(f"Batch {index}: targets must be real, got {examples.targets.dtype}.")
        single = any(not tensor.dim() for tensor in tensors.values())
        if single or len({len(tensor) for tensor in tensors.values()}) > 1:
            hint = "; put single examples into batches by a DataLoader" if single else ""
            raise ValueError(
                f"Batch {index} has {listed_shapes(tensors)}: the first dimensions, which count "
                f"the examples, must be equal{hint}."
            )
        if examples.weights is not None and not sizes_for(examples.weights.device).waits:
            check_weights(examples.weights, index)
        return examples.map(lambda t: t.to(self.device, non_blocking=True))

    def _of_dict(self, batch: Mapping[str, Any], index: int) -> tuple[Examples, dict[str, Tensor]]:
        """The examples of a dict, and its tensors by their names in messages."""
        tensors = dict(batch)
        for key, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(  # noqa: TRY004 - as for any other batch that does not fit
                    f"Batch {index} is a {type(batch).__name__} whose {key!r} is a "
                    f"{type(value).__name__}: every entry must be a tensor."
                )
        inputs = dict(tensors)
        targets = inputs.pop(LABELS, None)
        weights = None if WEIGHTS in self.names else inputs.pop(WEIGHTS, None)
        fault = self._fault(inputs) if inputs else "has no inputs"
        if fault:
            names = [name for name in self.names if name != LABELS]
            raise ValueError(f"Batch {index} {fault}: {self.name} takes {_quoted(names)}.")
        if self.names and (unnamed := [key for key in inputs if key not in self.names]):
            # Without the number of the batch, so that the same text is shown once.
            warnings.warn(
                f"{self.name} has no argument {_quoted(unnamed)}, which goes to its **{self.rest}; "
                f"labels are under {LABELS!r} and sample weights under {WEIGHTS!r}.",
                stacklevel=2,
            )
        return Examples(Arguments((), inputs), targets, weights), tensors

    def _of_fields(self, batch: Any, index: int) -> tuple[Examples, dict[str, Tensor]]:
        """The examples of ``(x, y, ..., task)``, and its tensors by their names in messages."""
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise ValueError(_not_a_batch(batch, index))
        x, y, *others = batch
        given = x if isinstance(x, Arguments) else Arguments(_inputs(x))
        tensors = given.labelled() | {"y": y}
        if len(tensors) == 1 or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError(_not_a_batch(batch, index))
        if given is x:
            return Examples(given, y), tensors
        call = self._call(given.positional, others[-1:], index)
        if len(call.positional) > len(given.positional):
            if not isinstance(others[-1], Tensor):
                raise ValueError(_not_a_batch(batch, index))
            tensors["task"] = others[-1]
        return Examples(call, y), tensors

    def _call(
        self, inputs: tuple[Tensor | dict[str, Tensor], ...], task: list[Tensor], index: int
    ) -> Arguments:
        """The arguments for these inputs and, if given, task labels."""
        if len(inputs) == 1 and isinstance(inputs[0], dict):
            if not (fault := self._fault(inputs[0])):
                return Arguments((), inputs[0])
            # A model of one argument may take a dict, even one with a key of its name.
            if len(self.names) > 1 and not inputs[0].keys().isdisjoint(self.names):
                raise ValueError(f"Batch {index} {fault}: {self.name} takes {_quoted(self.names)}.")
        following = self.positional[len(inputs) : len(inputs) + 1]
        # The task labels go to an argument after the inputs without a default or of this name.
        needs_task = any(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in following)
        takes_task = (
            needs_task or self.any_number or any(p.name == "task_labels" for p in following)
        )
        if needs_task and not task:
            name = following[0].name
            raise ValueError(
                f"Batch {index} is (x, y), but {self.name} also needs {name!r}: "
                f"data must be batches (x, y, {name})."
            )
        return Arguments((*inputs, *task) if takes_task else inputs)

    def _fault(self, inputs: Mapping[str, Tensor]) -> str | None:
        """What is wrong with inputs that are passed by name."""
        unknown = [] if self.any_name else [key for key in inputs if key not in self.names]
        if unknown:
            return f"has the unknown input {unknown[0]!r}"
        missing = [name for name in self.required if name not in inputs]
        return f"lacks {missing[0]!r}" if missing else None


def check_dense(tensors: Iterable[tuple[str, Tensor]], index: int) -> None:
    """Check that tensors can be cut into examples.

    Args:
        tensors: the tensors of a batch, with their names.
        index: the number of the batch, for messages.

    Raises:
        ValueError: a tensor is sparse, nested, or on ``meta``.
    """
    for name, tensor in tensors:
        is_nested = tensor.is_nested
        if is_nested or tensor.layout != torch.strided:
            kind = "nested" if is_nested else str(tensor.layout).removeprefix("torch.")
            raise ValueError(
                f"Batch {index}: {name} must be a dense tensor with one row for each example, got "
                f"a {kind} tensor; to_dense() makes it dense, or to_padded_tensor(0)."
            )
        check_has_numbers(tensor, f"Batch {index}: {name}")


def check_weights(weights: Tensor, index: int) -> None:
    """Check the sample weights of a batch.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    wrong = weights[~(weights.isfinite() & (weights >= 0))]
    if wrong.numel():
        raise ValueError(
            f"Batch {index}: weights must be finite numbers, 0 or above, got {wrong[0].item()}."
        )


def _inputs(x: Any) -> tuple[Any, ...]:
    """The positional arguments in the ``x`` of a batch."""
    if isinstance(x, Mapping):
        return (dict(x),)
    return tuple(x) if isinstance(x, list | tuple) else (x,)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _not_a_batch(batch: Any, index: int) -> str:
    kind = type(batch).__name__
    if isinstance(batch, list | tuple):
        kind += f" ({', '.join(type(item).__name__ for item in batch)})"
        if len(batch) > 1 and isinstance(batch[0], Mapping):
            odd = [key for key, t in batch[0].items() if not isinstance(t, Tensor)]
            if odd:
                kind += f", whose x[{odd[0]!r}] is a {type(batch[0][odd[0]]).__name__}"
    hint = "; a single batch goes into a list, [(x, y)]" if isinstance(batch, Tensor) else ""
    return (
        f"Batch {index} is a {kind}: data must be batches of tensors (x, y) or "
        f"(x, y, ..., task), x also a dict or list of tensors, or dicts with 'labels'{hint}; "
        "for anything else take Empirical(loss=...)."
    )
