r"""The pass over the data that makes a Fisher matrix."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ewc.fisher.diagonal import DiagonalFisher
from ewc.fisher.estimators import Estimator, Exact
from ewc.fisher.layers import CHUNK_BYTES
from ewc.fisher.matrix import FisherMatrix
from ewc.fisher.tape import Layer, Tape, layers_by_example, layers_with_rules
from ewc.likelihoods import Categorical, Likelihood
from ewc.parameters import Parameters, trainable_parameters

Structure = TypeVar("Structure", bound=FisherMatrix)

EXAMPLES_AT_ONCE = 512
"""Larger batches are cut: products this tall are as fast, and their results stay in cache."""


def fisher_information(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    estimator: Estimator = Exact(),
    structure: type[Structure] = DiagonalFisher,  # type: ignore[assignment]
) -> Structure:
    r"""The Fisher information of ``model`` at its present parameters, a mean over examples.

    :math:`F = \frac1N \sum_n J_n^\top \big(\sum_k s_{kn} s_{kn}^\top\big) J_n` with the
    Jacobian :math:`J_n = \partial f(x_n) / \partial \theta` and the estimator's score
    vectors :math:`s_{kn}`; of it, what ``structure`` keeps.

    The network is in evaluation mode meanwhile.  ``model.training``, every ``.grad``,
    every buffer and the global random number generators are afterwards as they were, also
    when an error ends the pass.

    Args:
        model: maps a batch ``x`` (or ``x`` and task labels) to outputs ``[n, c]``, each
            example's outputs depending on that example alone.
        data: batches ``(x, y)`` or ``(x, y, task)``.  The task labels go to a model whose
            ``forward`` takes a second argument, as Avalanche's multi-head models do.
        likelihood: what the outputs mean.
        estimator: how the expectation over targets is taken.
        structure: what of the matrix to keep, a class.

    Returns:
        The matrix over the parameters with ``requires_grad``, on their device.

    Raises:
        ValueError: the data are empty or no batches, a target does not fit the outputs,
            the outputs are not ``[n, c]``, a BatchNorm has no running
            statistics (its examples are not independent), or no parameter is trainable.
        FloatingPointError: the outputs, or the scores they give, are not finite.
        TypeError: the likelihood or the estimator is none.
    """
    for value, kind in ((likelihood, Likelihood), (estimator, Estimator)):
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is no {kind.__name__}: an instance of one is needed.")
    parameters = trainable_parameters(model)
    total = structure.accumulator(parameters)
    generator = torch.Generator().manual_seed(estimator.seed)
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        network = Network(model, parameters, likelihood, estimator)
        num_examples = 0
        for index, batch in enumerate(data):
            inputs, targets = network.arguments(batch, index)
            for found in network.pulled_back(inputs, targets, generator, index):
                with torch.no_grad():
                    total.add(found)
            num_examples += targets.shape[0]
    if num_examples == 0:
        raise ValueError("The data are empty: the Fisher information needs an example.")
    fisher = total.mean(num_examples)
    assert isinstance(fisher, structure)
    return fisher


class Network:
    """A model with what is known of it once its first batch has been seen."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        likelihood: Likelihood,
        estimator: Estimator,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.likelihood = likelihood
        self.estimator = estimator
        self.device = next(iter(parameters.values())).device
        self.with_task = takes_task(model)
        self.layers: list[Layer] | None = None
        self.in_order = False
        self.examples_at_once = 1
        self.vectors_at_once = 1

    def arguments(self, batch: Any, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The model's arguments and the targets of a batch, on the model's device.

        Raises:
            ValueError: the batch is not ``(x, y)`` or ``(x, y, task)`` of equal lengths.
        """
        tensors = isinstance(batch, list | tuple) and all(isinstance(t, Tensor) for t in batch)
        if not tensors or len(batch) not in (2, 3):
            raise ValueError(
                f"Batch {index} is a {type(batch).__name__}: the data must be batches of "
                "tensors (x, y) or (x, y, task)."
            )
        if len({t.shape[0] if t.dim() else -1 for t in batch}) != 1 or not batch[0].dim():
            raise ValueError(
                f"Batch {index} has tensors of shapes {[list(t.shape) for t in batch]}: "
                "their first dimensions, the examples, must be equal."
            )
        if self.with_task and len(batch) == 2:
            raise ValueError(
                f"Batch {index} is (x, y), but {type(self.model).__name__} takes task "
                "labels: the data must be batches (x, y, task)."
            )
        x, y, *task = (t.to(self.device, non_blocking=True) for t in batch)
        return (x, *task) if self.with_task else (x,), y

    def pulled_back(
        self, inputs: tuple[Tensor, ...], targets: Tensor, generator: torch.Generator, index: int
    ) -> Iterator[list[Any]]:
        """The pulled-back score vectors of one batch, a chunk at a time."""
        if targets.shape[0] == 0:
            return
        if self.layers is None:
            self.layers = self._look_at(tuple(a[:1] for a in inputs), targets[:1])
        for start in range(0, targets.shape[0], self.examples_at_once):
            part = slice(start, start + self.examples_at_once)
            arguments = tuple(argument[part] for argument in inputs)
            with Tape(self.model, self.parameters, self.layers) as tape:
                # A copy: a network may write into its input, which is the user's.
                outputs = self.model(*(argument.clone() for argument in arguments))
            scores = self._scores(outputs, targets[part], generator, index)
            if not (scores.shape[0] and outputs.requires_grad):
                continue
            if not self.in_order and len(outputs) > 1:
                self.layers = tape.layers = tape.layers_in_order(outputs, scores)
                self.in_order = True
            yield from tape.pullbacks(arguments, outputs, scores, self.vectors_at_once)

    def _scores(
        self, outputs: Any, targets: Tensor, generator: torch.Generator, index: int
    ) -> Tensor:
        """The estimator's score vectors ``[k, n, c]``, after checking what they come from."""
        check_outputs(outputs, targets.shape[0])
        try:
            self.likelihood.check_targets(outputs, targets)
        except ValueError as error:
            raise ValueError(f"Batch {index}: {error}") from None
        scores = self.estimator.score_vectors(self.likelihood, outputs.detach(), targets, generator)
        if bool(outputs.isnan().any()) or not bool(scores.isfinite().all()):
            raise FloatingPointError(
                f"Batch {index}: the scores of the model's outputs are not finite, so the "
                "Fisher information is not defined; check the parameters and the inputs."
            )
        return scores

    def _look_at(self, one: tuple[Tensor, ...], targets: Tensor) -> list[Layer]:
        """Find which rules may hold, and how much fits into memory, from one example.

        Args:
            one: the model's arguments for one example.
            targets: its target.

        Returns:
            The layers whose rule may hold.
        """
        candidates = layers_with_rules(self.model, self.parameters)
        with Tape(self.model, self.parameters, candidates) as single:
            outputs = self.model(*(argument.clone() for argument in one))
        scores = self._scores(outputs, targets, torch.Generator(), 0)
        with Tape(self.model, self.parameters, candidates) as double:
            self.model(*(torch.cat([argument, argument]) for argument in one))
        # For each example: a gradient of every recorded output a vector, and the vectors
        # themselves with what it takes to make them.
        gradient = (single.output_size() + outputs.numel()) * outputs.element_size()
        vectors = 4 * scores.numel() * outputs.element_size()
        fitting = CHUNK_BYTES // (8 * gradient + vectors)
        self.examples_at_once = max(1, min(EXAMPLES_AT_ONCE, fitting))
        self.vectors_at_once = max(1, CHUNK_BYTES // (self.examples_at_once * gradient))
        return layers_by_example(candidates, single, double)


def check_outputs(outputs: Any, num_examples: int) -> None:
    """Check that a model returned outputs ``[n, c]``.

    Raises:
        ValueError: it returned something else.
    """
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and len(outputs) == num_examples:
        return
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ValueError(
        f"The model returned {shape} for {num_examples} examples: its outputs must be a tensor "
        "of shape [n, c], for one example too."
    )


def takes_task(model: nn.Module) -> bool:
    """Whether ``forward`` wants task labels: a second argument without a default."""
    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner: Any = model.module if wrapped else model
    positional = [
        parameter
        for parameter in signature(inner.forward).parameters.values()
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(positional) > 1 and (
        positional[1].default is Parameter.empty or positional[1].name == "task_labels"
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, buffers and random states as before afterwards.

    Raises:
        ValueError: a BatchNorm layer without running statistics makes examples depend on
            each other, so that no example has a Fisher information of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name or type(module).__name__} normalises by the batch even in evaluation "
                "mode: BatchNorm needs track_running_stats=True for a Fisher information."
            )
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, copy in buffers:
                    if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                        buffer.copy_(copy)
                    module._buffers[name] = buffer
