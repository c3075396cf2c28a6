"""What a training strategy computes for a mini-batch, for a pass over its data.

A strategy is what Avalanche calls one: an object with ``model``, ``mbatch``,
``_unpack_minibatch()``, ``forward()`` and ``mb_y``.  Subclasses override any of them, so the
function that is trained is known to the strategy alone.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ewc.pullback.arguments import Arguments

Batch = tuple[Arguments, Any]
"""How a network is called for a mini-batch, and the targets."""


class Calls(Protocol):
    """How mini-batches go through a network."""

    @property
    def network(self) -> nn.Module:
        """The network that is called."""

    def __call__(self, mbatch: Any) -> Batch:
        """The call of the network for a mini-batch."""


def strategy_calls(strategy: Any, model: nn.Module, mbatch: Any) -> Calls:
    """How a strategy computes outputs from mini-batches.

    Where ``forward()`` returns what one call of the model returns, the network is the model
    itself.  Else it is all of ``forward()``.

    Args:
        strategy: the strategy; it stays as it is.
        model: its model without wrappers, in evaluation mode.
        mbatch: a mini-batch, as the strategy's data loader gives it.
    """
    own = beside(strategy, model)
    own.mbatch = copy.copy(mbatch)
    calls: list[tuple[Any, Any, Any, Any]] = []

    def remember(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, output, getattr(output, "_version", None)))

    own._unpack_minibatch()
    handle = model.register_forward_hook(remember, with_kwargs=True)
    try:
        with torch.enable_grad():
            returned = own.forward()
    finally:
        handle.remove()
    if len(calls) == 1:
        args, kwargs, output, version = calls[0]
        arguments = _arguments(args, kwargs, len(own.mb_y))
        unchanged = returned is output and version == getattr(output, "_version", None)
        # Inputs that depend on parameters are a part of the network.
        if unchanged and arguments and not any(t.requires_grad for t in arguments.tensors()):
            return ModelCalls(own)
    return StrategyCalls(StrategyNetwork(strategy, model, mbatch))


class ModelCalls:
    """The model's own arguments, which the strategy's ``forward()`` gives it.

    Args:
        strategy: a copy whose state may change.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.network: nn.Module = strategy.model

    def __call__(self, mbatch: Any) -> Batch:
        """The call of the model for a mini-batch; the model is not run."""
        strategy = self.strategy
        strategy.mbatch = mbatch
        strategy._unpack_minibatch()

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            raise CallError(args, kwargs)

        handle = self.network.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            strategy.forward()
        except CallError as call:
            arguments = _arguments(call.positional, call.named, len(strategy.mb_y))
            if arguments is not None:
                return arguments.map(torch.Tensor.detach), strategy.mb_y
        finally:
            handle.remove()
        raise ValueError(
            f"{type(strategy).__name__}.forward() calls its model in another way for some "
            "mini-batches than for the first: it must call it once, with tensors of a row an "
            "example."
        )


class CallError(Exception):
    """Ends ``forward()`` where the model is called; it never leaves this file."""

    def __init__(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.positional = positional
        self.named = named


class StrategyNetwork(nn.Module):
    """All that a strategy does from a mini-batch to outputs, as a network.

    Its parameters, buffers and modules are the model's own, under the same names.

    Args:
        strategy: the strategy; it stays as it is.
        model: its model without wrappers.
        mbatch: a mini-batch, whose kind the others have.
    """

    def __init__(self, strategy: Any, model: nn.Module, mbatch: Any) -> None:
        super().__init__()
        # The same dicts, not copies: what takes a parameter's place there does so in the
        # model too.
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[kind] = vars(model)[kind]
        self.training = model.training
        # Not a submodule, which would give the parameters other names.
        vars(self)["model"] = model
        self.strategy = beside(strategy, model)
        self.mapping = copy.copy(mbatch) if isinstance(mbatch, Mapping) else None

    def forward(self, *items: Any, **entries: Tensor) -> Any:
        """The outputs for a mini-batch of these items, or of these entries."""
        if self.mapping is None:
            self.strategy.mbatch = list(items)
        else:
            self.strategy.mbatch = copy.copy(self.mapping)
            self.strategy.mbatch.update(entries)
        self.strategy._unpack_minibatch()
        return self.strategy.forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StrategyNetwork":
        """The same network with a copy of the model; the strategy is not copied."""
        model = copy.deepcopy(vars(self)["model"], memo)
        return StrategyNetwork(self.strategy, model, self.mapping)


@dataclass(frozen=True)
class StrategyCalls:
    """Mini-batches as they are, for a network that unpacks them itself."""

    network: StrategyNetwork

    def __call__(self, mbatch: Any) -> Batch:
        """The call for a mini-batch.

        Raises:
            ValueError: the mini-batch cannot be cut into examples.
        """
        strategy = self.network.strategy
        strategy.mbatch = copy.copy(mbatch)
        strategy._unpack_minibatch()
        targets = strategy.mb_y
        named = isinstance(mbatch, Mapping)
        call = ((), dict(mbatch)) if named else (tuple(mbatch), {})
        arguments = _arguments(*call, len(targets))
        if arguments is None:
            items = dict(mbatch).values() if named else mbatch
            raise ValueError(
                f"{type(strategy).__name__}.forward() does more than to return what its model "
                "returns, so that its mini-batches must be of tensors, or dicts of tensors, "
                f"with a row an example: one has {', '.join(map(_described, items))}."
            )
        return arguments, targets


@dataclass(frozen=True)
class Batches:
    """The data of a loader, as often as they are asked for.

    Attributes:
        loader: gives a strategy's mini-batches.
        calls: how they go through the network.
        most: how many examples there are at most; ``None`` for all.
    """

    loader: Iterable[Any]
    calls: Calls
    most: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """The call of the network, and the targets, of every mini-batch."""
        left = self.most
        for mbatch in self.loader:
            arguments, targets = self.calls(mbatch)
            if left is not None:
                arguments, targets = arguments[:left], targets[:left]
                left -= len(arguments)
            yield arguments, targets
            if left == 0:
                return


def beside(strategy: Any, model: nn.Module) -> Any:
    """A copy of a strategy with another model: what is set on it, is not set on the strategy."""
    other = object.__new__(type(strategy))
    vars(other).update(vars(strategy), model=model)
    return other


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Arguments | None:
    """The arguments of a call where they are tensors of so many rows, else ``None``."""
    positional = tuple(dict(a) if isinstance(a, Mapping) else a for a in args)
    values = [v for a in positional for v in (a.values() if isinstance(a, dict) else [a])]
    values += kwargs.values()
    if values and all(isinstance(v, Tensor) and v.dim() and len(v) == rows for v in values):
        return Arguments(positional, dict(kwargs))
    return None


def _described(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {list(item.shape)}"
    return f"a {type(item).__name__}"
