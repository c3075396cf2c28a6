"""The arguments of a network: tensors, or dicts of tensors, with one row per example."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.func import functional_call

from ewc.parameters import Parameters
from ewc.pullback.call import Call, outputs_of


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
