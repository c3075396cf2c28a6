"""One call of a network for a set of examples: what is differentiated."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ewc.parameters import Parameters


class Call(ABC):
    """A function of a network, and what it is called with, for a set of examples.

    Attributes:
        independence: what the result must fulfil, for messages.
    """

    independence: ClassVar[str] = (
        "The Fisher information is a sum over examples: the outputs of an example must depend on "
        "that example alone, not on the rest of its batch (through batch statistics, a missing "
        "batch_first=True or a graph)."
    )

    @abstractmethod
    def result(self, model: nn.Module) -> Tensor:
        """The outputs; the network may write into the tensors of this call."""

    @abstractmethod
    def substituted(self, model: nn.Module, parameters: Parameters) -> Tensor:
        """As :meth:`result`, with other values of some parameters, by name."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same call with ``function`` applied to every tensor."""

    @abstractmethod
    def __getitem__(self, examples: slice | Tensor) -> Self:
        """The call for some of the examples; a slice gives views."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abstractmethod
    def walk(self) -> Iterator[Tensor]:
        """All tensors, in a fixed order."""

    @abstractmethod
    def labelled(self) -> dict[str, Tensor]:
        """The tensors with one row per example, by their names in messages."""

    @property
    def in_rows(self) -> bool:
        """Whether every tensor has one row per example, so that ``vmap`` can go over them."""
        return True

    def __call__(self, model: nn.Module) -> Tensor:
        """The outputs for a copy of the tensors, since the network may write into them."""
        return self.map(torch.clone).result(model)

    def called(self, model: nn.Module, parameters: Parameters) -> Tensor:
        """The outputs at other values of some parameters, as a function for ``torch.func``."""
        return self.map(torch.clone).substituted(model, parameters)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return list(self.walk())

    def with_tensors(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> Self:
        """The same call with other tensors, in the order of :meth:`tensors`."""
        following = iter(tensors)
        return self.map(lambda _: next(following))


def outputs_of(result: Any) -> Tensor:
    """The outputs in what a model returned.

    Args:
        result: a tensor, an object with the tensor ``.logits`` (as the models of Hugging Face
            return), a dict with the tensor ``"logits"`` or ``"out"`` (torchvision's
            segmentation), or a tuple or list whose first entry is a tensor.

    Raises:
        ValueError: the result is something else.
    """
    if isinstance(result, Tensor):
        return result
    outputs = getattr(result, "logits", None)
    if outputs is None and isinstance(result, Mapping):
        outputs = result.get("logits", result.get("out"))
    if outputs is None and isinstance(result, tuple | list) and result:
        outputs = result[0]
    if isinstance(outputs, Tensor):
        return outputs
    raise ValueError(
        f"The model returned {_described(result)}: it must return a tensor, an object with "
        ".logits, a dict with 'logits' or 'out', or a tuple that begins with a tensor."
    )


def _described(result: Any) -> str:
    kind = f"a result of type {type(result).__name__}"
    if isinstance(result, Mapping | tuple | list) and not result:
        return f"{kind} that is empty"
    if isinstance(result, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, result))}"
    if isinstance(result, tuple | list):
        return f"{kind} with entries of type {', '.join(type(r).__name__ for r in result)}"
    return kind


def listed_shapes(tensors: Mapping[str, Tensor]) -> str:
    """Names and shapes as a message lists them."""
    return ", ".join(f"{name} of shape {list(t.shape)}" for name, t in tensors.items())
