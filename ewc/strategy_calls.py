"""How a training strategy calls its network for a mini-batch.

A strategy is meant in Avalanche's sense: an object with ``model``, ``mbatch``,
``_unpack_minibatch()``, ``forward()`` and ``mb_y``.  Subclasses override any of them, so only
the strategy knows the function that it trains.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ewc.pullback.arguments import Arguments

Batch = tuple[Arguments, Any]
"""The arguments of the network for a mini-batch, and the targets."""


class Calls(Protocol):
    """From mini-batches to the arguments of a network."""

    @property
    def network(self) -> nn.Module:
        """The network that is called."""

    def __call__(self, mbatch: Any) -> Batch:
        """The network's arguments and the targets for a mini-batch."""


def strategy_calls(strategy: Any, model: nn.Module, mbatch: Any) -> Calls:
    """The calls by which a strategy computes outputs from mini-batches.

    The network is the model itself where ``forward()`` returns the result of one call of it.
    Otherwise the network is all of ``forward()``.

    Args:
        strategy: the strategy, which is not changed.
        model: its model without wrappers, in evaluation mode.
        mbatch: a mini-batch of the strategy's data loader.
    """
    strategy_copy = beside(strategy, model)
    strategy_copy.mbatch = copy.copy(mbatch)
    calls: list[tuple[Any, Any, Any, Any]] = []

    def remember(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, output, getattr(output, "_version", None)))

    strategy_copy._unpack_minibatch()
    handle = model.register_forward_hook(remember, with_kwargs=True)
    try:
        with torch.enable_grad():
            returned = strategy_copy.forward()
    finally:
        handle.remove()
    if len(calls) == 1:
        args, kwargs, output, version = calls[0]
        arguments = _arguments(args, kwargs, len(strategy_copy.mb_y))
        unchanged = returned is output and version == getattr(output, "_version", None)
        # Where inputs depend on parameters, the network begins before them.
        if unchanged and arguments and not any(t.requires_grad for t in arguments.tensors()):
            return ModelCalls(strategy_copy)
    return StrategyCalls(StrategyNetwork(strategy, model, mbatch))


class ModelCalls:
    """The arguments with which the strategy's ``forward()`` calls its model.

    Args:
        strategy: a copy, whose state may change.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.network: nn.Module = strategy.model

    def __call__(self, mbatch: Any) -> Batch:
        """The model's arguments and the targets for a mini-batch; the model does not run.

        Raises:
            ValueError: ``forward()`` calls the model differently than for the first mini-batch.
        """
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
            f"{type(strategy).__name__}.forward() must call its model once for every "
            "mini-batch, with tensors that have one row for each example."
        )


class CallError(Exception):
    """Ends ``forward()`` at the call of the model; raised and caught in this file only."""

    def __init__(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.positional = positional
        self.named = named


class StrategyNetwork(nn.Module):
    """A strategy's whole way from a mini-batch to outputs, as a network.

    Its parameters, buffers and modules are those of the model, under the same names.

    Args:
        strategy: the strategy, which is not changed.
        model: its model without wrappers.
        mbatch: a mini-batch of the type that the loader gives.
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
        """The outputs for a mini-batch with these items, or with these named entries."""
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
    """Whole mini-batches, for a network that unpacks them itself."""

    network: StrategyNetwork

    def __call__(self, mbatch: Any) -> Batch:
        """The mini-batch as arguments, and its targets.

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
                f"Mini-batches of {type(strategy).__name__} must be tensors or dicts of tensors "
                "with one row for each example, as its forward() does more than call the model; "
                f"got {', '.join(map(_described, items))}."
            )
        return arguments, targets


@dataclass(frozen=True)
class Batches:
    """The batches of a loader, for any number of passes.

    Attributes:
        loader: the loader of a strategy's mini-batches.
        calls: from mini-batches to the network's arguments.
        most: the largest number of examples; ``None`` for all.
    """

    loader: Iterable[Any]
    calls: Calls
    most: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """The network's arguments and the targets of every mini-batch."""
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
    """A shallow copy of a strategy with another model; setting its attributes is safe."""
    other = object.__new__(type(strategy))
    vars(other).update(vars(strategy), model=model)
    return other


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Arguments | None:
    """The arguments of a call if all are tensors with ``rows`` rows, else ``None``."""
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
