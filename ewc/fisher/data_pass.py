"""A pass of the data through the network, in chunks that fit into memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ewc.fisher.estimators import Estimator
from ewc.fisher.evaluation import dense_parts
from ewc.fisher.structures.structure import (
    Accumulator,
)
from ewc.likelihoods import Likelihood
from ewc.parameters import Parameters
from ewc.pullback.agreement import same
from ewc.pullback.arguments import Arguments, Caller, listed_shapes
from ewc.pullback.graph import Graph
from ewc.pullback.per_example import INDEPENDENT, reproducible
from ewc.pullback.pullback import Chunk
from ewc.pullback.tape import KnownGraphs, Tape

Result = TypeVar("Result")

EXAMPLES_AT_ONCE = 512
"""The largest chunk: larger ones are no faster, and their results leave the cache."""

CACHE = 2**24
"""The largest size in bytes of an operation's gradients in a processor's last cache."""

FEW = 8
"""The number of examples that are tested for dependence on each other."""

LEAST_FOR_SCORES = 2**24
"""Bytes that the score vectors of one example may always take."""

SORTED_AT_ONCE = 64
"""The largest chunk if examples are sorted by the number of vectors that they need."""


class DataPass:
    """A model, and what is known about it from the batches so far."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        likelihood: Likelihood,
        estimator: Estimator,
        memory: int,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.likelihood = likelihood
        self.estimator = estimator
        self.memory = memory
        self.caller = Caller(model, next(iter(parameters.values())).device)
        self.seen = KnownGraphs()
        self.independent = False
        """Whether examples were tested to have the same outputs alone as in their batch."""
        self.depends = False
        """Whether any outputs depend on any of the parameters."""
        self.fitting: dict[tuple[torch.Size, ...], tuple[int, int]] = {}
        """The examples and the score vectors that fit into memory, by the inputs' shapes."""

    def summed_up(self, data: Iterable[Any], total: Accumulator[Any], rank: int) -> int:
        """Add all data to ``total``, and return the number of examples."""
        # Every process draws different targets.
        generator = torch.Generator().manual_seed(self.estimator.seed + 1_000_003 * rank)
        num_examples = 0
        for index, batch in enumerate(data):
            arguments, targets = self.caller.arguments(batch, index)
            for chunk in self.chunks(arguments, targets, generator, index):
                with torch.no_grad():
                    total.add(chunk)
            num_examples += targets.shape[0]
        return num_examples

    def chunks(
        self, arguments: Arguments, targets: Tensor, generator: torch.Generator, index: int
    ) -> Iterator[Chunk]:
        """One batch in chunks that fit into memory, with their score vectors."""
        if targets.shape[0] == 0:
            return
        if not self.independent and targets.shape[0] > 1:
            self._check_independence(arguments, targets, index)
            self.independent = True
        one = arguments[:1]
        key = tuple(tensor.shape for tensor in one.tensors())
        if key not in self.fitting:
            self.fitting[key] = self._of_batch(
                partial(self._fitting, one, targets[:1], index), arguments, targets, index
            )
        at_once, vectors_at_once = self.fitting[key]
        order = self._by_effort(arguments, at_once)
        if order is not None:
            arguments, targets = arguments.map(lambda t: t[order]), targets[order]
            at_once = min(at_once, SORTED_AT_ONCE)
        for start in range(0, targets.shape[0], at_once):
            examples = slice(start, start + at_once)
            inputs = arguments[examples]
            outputs, scores = self._of_batch(
                partial(self._scored, inputs, targets[examples], generator, index),
                arguments,
                targets,
                index,
            )
            yield self._chunk(inputs, outputs, scores, vectors_at_once)

    def _chunk(
        self, arguments: Arguments, outputs: Tensor, scores: Tensor, vectors_at_once: int
    ) -> Chunk:
        """The examples of one forward pass with their score vectors."""
        alone = partial(self._alone, arguments, scores, vectors_at_once)
        if not (scores.shape[0] and outputs.requires_grad):
            self.depends = self.depends or outputs.requires_grad
            return Chunk(self.model, arguments, scores, lambda: iter(()), alone)
        with torch.no_grad():
            tape = Tape(self.model, self.parameters, arguments, outputs, self.seen)
        self.depends = self.depends or bool(tape.present)
        pullbacks = partial(tape.pullbacks, scores, vectors_at_once, self.memory // 2)
        return Chunk(
            self.model, arguments, scores, pullbacks, alone, partial(tape.recognised, scores)
        )

    def _alone(self, arguments: Arguments, scores: Tensor, vectors_at_once: int) -> Iterator[Chunk]:
        """The examples of a chunk, each in a separate chunk."""
        for i in range(len(arguments)):
            one = arguments[i : i + 1]
            with torch.enable_grad():
                outputs = one(self.model)
            yield self._chunk(one, outputs, scores[:, i : i + 1], vectors_at_once)

    def _of_batch(
        self, compute: Callable[[], Result], arguments: Arguments, targets: Tensor, index: int
    ) -> Result:
        """The result of a computation on a slice of a batch.

        Its errors give the sizes of the whole batch, which the user knows.

        Raises:
            Exception: the error of the whole batch if the computation fails; if the whole
                batch raises none, the error of the slice.
        """
        try:
            return compute()
        except FloatingPointError:
            raise
        except Exception as error:
            failed = error
        # Outside the handler, so that the traceback has one error.
        self._check(self._outputs_for_batch(arguments, index), targets, index)
        raise failed

    def _outputs_for_batch(self, arguments: Arguments, index: int) -> Any:
        """The model's outputs for a whole batch; an error has a note with the batch."""
        try:
            return arguments(self.model)
        except Exception as error:
            shapes = listed_shapes(arguments.labelled())
            error.add_note(f"The model was called with batch {index}: {shapes}.")
            raise

    def _by_effort(self, arguments: Arguments, at_once: int) -> Tensor | None:
        """The order of the examples by the number of vectors that they need."""
        if not self.estimator.varies:
            return None
        needed = []
        for start in range(0, len(arguments), at_once):
            outputs = arguments[start : start + at_once](self.model).detach()
            needed.append(self.estimator.vectors_needed(self.likelihood, outputs))
        return torch.cat(needed).argsort()

    def _check_independence(self, arguments: Arguments, targets: Tensor, index: int) -> None:
        """Check that examples have the same outputs alone as together with a few others.

        The first and the last example are tested.  A recurrence over the examples does not
        change the first, and a reversed one does not change the last.

        Raises:
            ValueError: an example has other outputs alone.
        """
        few, count = arguments[:FEW], min(FEW, len(targets))
        try:
            together, first, last = (
                examples(self.model) for examples in (few, few[:1], few[count - 1 : count])
            )
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            # Raises the error if it is due to the network itself, or to the batch.
            self._outputs_for_batch(arguments, index)
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"Batch {index}: the model fails for the first {count} examples or for one "
                f"alone ({reason}), but not for the whole batch. {INDEPENDENT}"
            ) from error
        if not is_real(together) or len(together) != count:
            return  # The check of the whole batch raises the error.
        together = together.detach()
        spread = float((together - together.mean(0)).norm()) / count**0.5
        for place, alone in ((0, first.detach()), (count - 1, last.detach())):
            batched = together[place : place + 1]
            if alone.dim() != batched.dim() or alone.isnan().any() or batched.isnan().any():
                continue
            if alone.shape != batched.shape:
                raise ValueError(
                    f"Batch {index}: example {place} has outputs of shape {list(alone.shape)} "
                    f"alone and {list(batched.shape)} in its batch. {INDEPENDENT}"
                )
            if same(alone, batched, spread):
                continue
            # Outputs may differ without an effect on the likelihood, as by a shift of logits.
            one, other = (
                self.estimator.score_vectors(
                    self.likelihood, outputs, targets[place : place + 1], torch.Generator()
                )
                for outputs in (alone, batched)
            )
            if not same(one, other) and reproducible(self.model, few):
                raise ValueError(
                    f"Batch {index}: example {place} has other outputs alone than in its "
                    f"batch. {INDEPENDENT}"
                )

    def _scored(
        self, arguments: Arguments, targets: Tensor, generator: torch.Generator, index: int
    ) -> tuple[Tensor, Tensor]:
        """The outputs for a set of examples and their score vectors."""
        outputs = arguments(self.model)
        return outputs, self._scores(outputs, targets, generator, index)

    def _check(self, outputs: Any, targets: Tensor, index: int) -> None:
        """Check the outputs and the targets of a set of examples of a batch."""
        check_outputs(outputs, targets.shape[0], index)
        if not self.estimator.uses_targets:
            return
        try:
            self.likelihood.check_targets(outputs, targets)
        except ValueError as error:
            raise ValueError(f"Batch {index}: {error}") from None

    def _scores(
        self, outputs: Any, targets: Tensor, generator: torch.Generator, index: int
    ) -> Tensor:
        """The estimator's score vectors ``[k, n, c]``, for checked outputs and targets."""
        self._check(outputs, targets, index)
        scores = self.estimator.score_vectors(self.likelihood, outputs.detach(), targets, generator)
        if bool(outputs.isnan().any()) or not bool(scores.isfinite().all()):
            raise FloatingPointError(
                f"Batch {index}: the scores of the model's outputs are not finite; check the "
                "parameters and the inputs."
            )
        return scores

    def _fitting(self, one: Arguments, target: Tensor, index: int) -> tuple[int, int]:
        """The examples and the vectors that fit into memory, extrapolated from one example."""
        saved, outputs = saved_bytes(lambda: one(self.model), self.parameters)
        check_outputs(outputs, 1, index)
        needed = self.estimator.bytes_per_example(outputs)
        if needed > max(self.memory, LEAST_FOR_SCORES):
            raise ValueError(
                f"{self.estimator} of {outputs.shape[1]} outputs takes about "
                f"{needed / 2**20:.0f} MiB for the score vectors of one example, and memory is "
                f"{self.memory / 2**20:.0f} MiB: take MonteCarlo(num_samples), which has fewer "
                "vectors, or increase memory."
            )
        scores = self._scores(outputs, target, torch.Generator(), index)
        gradients = [0]
        if scores.shape[0] and outputs.requires_grad:
            tape = Tape(self.model, self.parameters, one, outputs, self.seen)
            gradients = tape.bytes_of_gradients(scores[0])
        k, c = scores.shape[0], outputs.numel()
        # Per vector and example: the gradients, the same again for intermediate results, and
        # the score vector itself with its intermediate results.
        vector = 2 * sum(gradients) + 4 * c * outputs.element_size()
        # The other half of the memory is for what is computed from the gradients.
        room = self.memory // 2
        examples = room // max(1, saved + k * vector)
        vectors = k if examples else max(1, (room - saved) // vector)
        if outputs.device.type == "cpu":
            examples = min(examples, CACHE // max(1, k * max(gradients)))
        return int(max(1, min(EXAMPLES_AT_ONCE, examples))), int(vectors)


def is_real(outputs: Any) -> TypeGuard[Tensor]:
    """Whether the outputs of a model are a tensor of real floating-point numbers."""
    return isinstance(outputs, Tensor) and outputs.is_floating_point()


def check_outputs(outputs: Any, num_examples: int, index: int) -> None:
    """Check that the outputs of a model for the examples of a batch are ``[n, c]``.

    Raises:
        ValueError: the outputs are something else.
    """
    if not is_real(outputs):
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"Batch {index}: the model returned outputs of type {kind}: it must return a "
            "floating-point tensor of shape [n, c] for n examples."
        )
    if outputs.dim() == 2 and len(outputs) == num_examples:
        return
    fix = ""
    if list(outputs.shape) == [num_examples] and num_examples > 1:
        fix = "; for one output per example, return outputs[:, None]"
    elif num_examples == 1:
        fix = ", for a single example too"
    raise ValueError(
        f"Batch {index}: the model returned outputs of shape {list(outputs.shape)} for "
        f"{num_examples} example{'s' * (num_examples > 1)}: it must return shape [n, c] for n "
        f"examples{fix}."
    )


def saved_bytes(forward: Callable[[], Any], parameters: Parameters) -> tuple[int, Any]:
    """The bytes that a forward pass stores for its derivative, and the pass's result."""
    excluded = {p.untyped_storage().data_ptr() for p in parameters.values()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for component in dense_parts(tensor):
            storage = component.untyped_storage()
            if storage.data_ptr() not in excluded:
                sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = forward()
    except RuntimeError:
        # A network that uses torch.func inside allows no hooks, so all results count.  An
        # error of the network itself is raised again here.
        outputs = forward()
        return Graph(outputs).bytes_of_results(), outputs
    return sum(sizes.values()), outputs
