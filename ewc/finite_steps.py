"""Stops a training loop of Avalanche whose numbers are not finite, without a wait in every step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc.growth import Growth
from ewc.linalg.devices import sizes_for
from ewc.penalty import EWCPenalty
from ewc.wrappers import named_parameters

LOOK_EVERY = 100
"""Steps from one look at the parameters to the next, and on an accelerator at the losses."""


class FiniteSteps:
    """Stops training at numbers that are not finite, and names the task, the step and the layer.

    On a host the loss is read in every step, and training stops before the optimizer steps.  The
    parameters and the optimizer's state are looked at every :data:`LOOK_EVERY` steps and at the
    end of a task.  A gradient that is not finite stays visible in them.

    Reading a loss from an accelerator would wait for it in every step.  There the losses and the
    norms of the gradients are gathered and read together with the parameters.  The message still
    names the first step.  By then the optimizer has stepped, and the parameters may be NaN: go
    back to a checkpoint.

    Args:
        penalty: the penalty in the loss, whose strength may be too large; ``None`` without one.
        growth: what warns of finite parameters that have grown beyond any use, at each look.
    """

    def __init__(self, penalty: EWCPenalty | None = None, growth: Growth | None = None) -> None:
        self.penalty = penalty
        self.growth = growth
        self._steps = self._looked_at = 0
        self._losses: list[tuple[int, Tensor]] = []
        self._gradients: list[tuple[int, dict[str, Tensor]]] = []

    def check_loss(self, strategy: Any) -> None:
        """Check the loss of a step, before the optimizer steps.

        Raises:
            FloatingPointError: a loss, a parameter or the optimizer's state is not finite; the
                message names the task and the step, both counted from 1, and the layer.
        """
        loss = strategy.loss.detach().reshape(())  # Avalanche has a list of one number
        step = strategy.clock.train_exp_iterations + 1
        if not self._steps:
            self._looked_at = step - 1
        self._steps += 1
        if sizes_for(loss.device).waits:
            self._losses.append((step, loss))
        elif not math.isfinite(value := loss.item()):
            self._stop(strategy, step, value)
        if self._steps % LOOK_EVERY == 0:
            self.look(strategy)

    def note_gradients(self, strategy: Any) -> None:
        """Keep the norms of a step's gradients on an accelerator, to name the layer of a fault."""
        gradients = {n: p.grad for n, p in named_parameters(strategy.model) if p.grad is not None}
        if gradients and sizes_for(strategy.loss.device).waits:
            norms = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
            self._gradients.append((strategy.clock.train_exp_iterations + 1, norms))

    def look(self, strategy: Any) -> None:
        """Look at what is not read yet, at the end of a task.

        Warns:
            UserWarning: parameters have grown beyond any use (:class:`ewc.growth.Growth`).

        Raises:
            FloatingPointError: as in :meth:`check_loss`.
        """
        if self._losses:
            steps, losses = zip(*self._losses, strict=True)
            for step, loss in zip(steps, torch.stack(losses).tolist(), strict=True):
                if not math.isfinite(loss):
                    self._stop(strategy, step, loss)
        done = int(strategy.clock.train_exp_iterations)
        if faults := not_finite(strategy.model, strategy.optimizer):
            when = f"between step {self._looked_at + 1} and step {done}"
            if gradient := self._first_gradient():
                step, name = gradient
                when = f"as the gradient of {name!r} is not finite in step {step}"
            raise FloatingPointError(
                f"{_listed(faults)} stopped being finite in task {task_number(strategy)}, {when}: "
                f"{self._smaller}."
            )
        if self.growth:
            self.growth.check(strategy.model, task_number(strategy), done)
        self._looked_at = done
        self._losses, self._gradients = [], []

    @property
    def _smaller(self) -> str:
        """What helps where training diverges."""
        strength = " or a smaller strength" if self.penalty and self.penalty.terms else ""
        return f"use a smaller learning rate{strength}"

    def _stop(self, strategy: Any, step: int, loss: float) -> None:
        """Raise, with what can be found out about the step."""
        reason, advice = self._reason(strategy)
        raise FloatingPointError(
            f"The loss became {loss} in task {task_number(strategy)}, step {step}, as {reason}: "
            f"{advice}."
        )

    def _reason(self, strategy: Any) -> tuple[str, str]:
        """Why a loss is not finite, and what helps."""
        if gradient := self._first_gradient():
            step, name = gradient
            return f"the gradient of {name!r} is not finite in step {step}", self._smaller
        if faults := not_finite(strategy.model, strategy.optimizer):
            return f"{_listed(faults)} stopped being finite in the step before", self._smaller
        if not all(_is_finite(tensor) for tensor in _tensors(strategy.mbatch)):
            return "the mini-batch is not finite", "check the data"
        if layer := _first_layer(strategy):
            return f"the outputs of {layer} are not finite", self._smaller
        largest = {n: float(p.detach().abs().max()) for n, p in named_parameters(strategy.model)}
        name = max(largest, key=largest.__getitem__)
        return (
            f"the penalty or the loss overflows (the largest parameter is in {name!r}, "
            f"{largest[name]:.2g})",
            self._smaller,
        )

    def _first_gradient(self) -> tuple[int, str] | None:
        """The first step whose gathered gradients are not finite, and the layer.

        A backward pass carries a fault towards the inputs, so the last parameter is named.
        """
        for step, norms in self._gradients:
            finite = torch.stack([norm.float() for norm in norms.values()]).isfinite().tolist()
            if not all(finite):
                return step, [n for n, good in zip(norms, finite, strict=True) if not good][-1]
        return None


def not_finite(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The trainable parameters and entries of the optimizer's state that are not finite.

    Finite numbers take one sweep and one value read back.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model):
        if parameter.requires_grad:
            tensors[f"parameter {name!r}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                    tensors[f"optimizer state {key!r} of {name!r}"] = value
    if not tensors:
        return []
    norms = torch._foreach_norm(list(tensors.values()))
    place = norms[0].device
    if bool(torch.stack([norm.to(place, torch.float32) for norm in norms]).isfinite().all()):
        return []
    # The square of a large finite number may be infinite.
    return [what for what, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _listed(faults: Sequence[str]) -> str:
    more = len(faults) - 1
    others = f" (and {more} other{'s' if more > 1 else ''})" if more else ""
    return f"the {faults[0]}{others}"


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a mini-batch."""
    if isinstance(batch, Tensor):
        if batch.is_floating_point():
            yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from _tensors(item)


def _first_layer(strategy: Any) -> str | None:
    """The first layer whose outputs for the mini-batch are not finite, found by another pass."""
    first: list[str] = []

    def note(name: str, module: nn.Module, _: Any, outputs: Any) -> None:
        if not first and not all(_is_finite(tensor) for tensor in _tensors(outputs)):
            first.append(f"{name!r} ({type(module).__name__})" if name else "the network")

    modules = strategy.model.named_modules()
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules]
    try:
        with torch.no_grad():
            strategy.forward()
    finally:
        for hook in hooks:
            hook.remove()
    return first[0] if first else None


def task_number(strategy: Any) -> int:
    """The number of the task in training, from 1."""
    return int(strategy.experience.current_experience) + 1
