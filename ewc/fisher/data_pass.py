"""A pass of the data through the network, in chunks that fit into memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ewc.fisher.estimators import Estimator
from ewc.fisher.faults import Faults, explained
from ewc.fisher.network_state import dense_parts
from ewc.fisher.structures.structure import Accumulator
from ewc.likelihoods import Likelihood
from ewc.linalg.devices import Sizes, out_of_memory, sizes_for
from ewc.parameters import Parameters
from ewc.pullback.agreement import same
from ewc.pullback.batches import LABELS, Caller, Examples
from ewc.pullback.call import Call, listed_shapes
from ewc.pullback.graph import Graph
from ewc.pullback.losses import LossCaller
from ewc.pullback.per_example import reproducible
from ewc.pullback.pullback import Chunk
from ewc.pullback.tape import KnownGraphs, Tape

Result = TypeVar("Result")

NOT_FINITE = FloatingPointError("the scores of the model's outputs are not finite")

NOT_FINITE_LOSS = FloatingPointError("the loss of an example is not finite")

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
        device = next(iter(parameters.values())).device
        self.caller: Caller | LossCaller = (
            Caller(model, device) if estimator.loss is None else LossCaller(estimator.loss, device)
        )
        self.seen = KnownGraphs()
        self.independence_tested = False
        """Whether examples were tested to have the same outputs alone as in their batch."""
        self.faults = Faults()
        self.outputs_use_parameters = False
        """Whether any outputs depend on any of the parameters."""
        self.needs: dict[tuple[torch.Size, ...], Needs] = {}
        """What one example needs of memory, by the inputs' shapes."""
        self.is_reduced = False
        """Whether memory was exhausted, so that chunks are smaller than asked for."""

    def summed_up(self, data: Iterable[Any], total: Accumulator[Any], rank: int) -> int:
        """Add all data to ``total``, and return the number of examples.

        Where memory is exhausted, a part of a batch may have been added.  The sums are then
        cleared, and the pass begins again with smaller chunks.  A copy of the sums would take
        the memory that is missing.

        Raises:
            MemoryError: one example does not fit into memory, or data can be read only once.
        """
        batches = iter(data)
        while True:
            # Every process draws different targets.
            generator = torch.Generator().manual_seed(self.estimator.seed + 1_000_003 * rank)
            num_examples = 0
            for index, batch in enumerate(batches):
                count = self._add(batch, index, total, generator)
                if count is None:
                    break
                num_examples += count
            else:
                with explained(self.model, None):
                    self.faults.check()
                return num_examples
            total.clear()
            self.faults = Faults()
            if index == 0:
                batches = chain([batch], batches)
            elif (again := iter(data)) is not data:
                batches = again
            else:
                raise MemoryError(
                    f"Batch {index}: memory is exhausted, and data is a {type(data).__name__}, "
                    "which can be read once: data must be a list of batches or a DataLoader, or "
                    f"memory lower, such as {self.memory}."
                )

    def _add(
        self, batch: Any, index: int, total: Accumulator[Any], generator: torch.Generator
    ) -> int | None:
        """Add a batch, and return the number of its examples.

        ``None`` if memory is exhausted; chunks are then smaller from now on.
        """
        examples = self.caller.examples(batch, index)
        try:
            for chunk in self.chunks(examples, generator, index):
                with torch.no_grad():
                    total.add(chunk)
            return len(examples)
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0].rstrip(".")
        # Outside the handler, as the error holds all tensors of the chunk.
        self._reduce(examples, index, reason)
        return None

    def _reduce(self, batch: Examples, index: int, reason: str) -> None:
        """Lower the memory until chunks of a batch are smaller.

        Raises:
            MemoryError: they have one example and one vector already.
        """
        needs = self.needs.get(_shapes_of(batch[:1]))
        if needs is None:
            raise MemoryError(
                f"Batch {index}: the network's outputs alone do not fit into memory, for at most "
                f"{FEW} examples and without a derivative ({reason})."
            )
        fitting = needs.fitting(self.memory)
        if fitting == (1, 1):
            raise MemoryError(
                f"Batch {index}: the derivatives of one example do not fit into memory "
                f"({reason}): take a structure with smaller sums, such as Diagonal(), or fewer "
                "parameters."
            )
        while needs.fitting(self.memory) == fitting:
            self.memory //= 2
        self.is_reduced = True

    def chunks(self, batch: Examples, generator: torch.Generator, index: int) -> Iterator[Chunk]:
        """One batch in chunks that fit into memory, with their score vectors."""
        if len(batch) == 0:
            return
        if self.estimator.uses_targets and batch.targets is None:
            raise ValueError(
                f"Batch {index} has no targets, which {self.estimator} needs: a dict must have "
                f"them under {LABELS!r}."
            )
        if not self.independence_tested and len(batch) > 1:
            self._check_independence(batch, index)
            self.independence_tested = True
        one = batch[:1]
        key = _shapes_of(one)
        if key not in self.needs:
            self.needs[key] = self._of_batch(partial(self._needs, one, index), batch, index)
        at_once, vectors_at_once = self.needs[key].fitting(self.memory)
        order = self._of_batch(partial(self._by_effort, batch, at_once, index), batch, index)
        if order is not None:
            batch = batch[order]
            at_once = min(at_once, SORTED_AT_ONCE)
        for start in range(0, len(batch), at_once):
            examples = batch[start : start + at_once]
            outputs, scores, weights = self._of_batch(
                partial(self._scored, examples, generator, index), batch, index
            )
            yield self._chunk(examples.arguments, outputs, scores, weights, vectors_at_once)

    def _chunk(
        self,
        arguments: Call,
        outputs: Tensor,
        scores: Tensor,
        weights: Tensor | None,
        vectors_at_once: int,
    ) -> Chunk:
        """The examples of one forward pass with their score vectors and weights."""
        alone = partial(self._alone, arguments, scores, weights, vectors_at_once)
        if not (scores.shape[0] and outputs.requires_grad):
            self.outputs_use_parameters = self.outputs_use_parameters or outputs.requires_grad
            return Chunk(self.model, arguments, scores, weights, lambda: iter(()), alone)
        with torch.no_grad():
            tape = Tape(self.model, self.parameters, arguments, outputs, self.seen)
        self.outputs_use_parameters = self.outputs_use_parameters or bool(tape.present)
        pullbacks = partial(tape.pullbacks, scores, vectors_at_once, self.memory // 2)
        recognised = partial(tape.recognised, scores)
        return Chunk(self.model, arguments, scores, weights, pullbacks, alone, recognised)

    def _alone(
        self, arguments: Call, scores: Tensor, weights: Tensor | None, vectors_at_once: int
    ) -> Iterator[Chunk]:
        """The examples of a chunk, each in a separate chunk."""
        for i in range(len(arguments)):
            one, weight = arguments[i : i + 1], None if weights is None else weights[i : i + 1]
            with torch.enable_grad():
                outputs = one(self.model)
            yield self._chunk(one, outputs, scores[:, i : i + 1], weight, vectors_at_once)

    def _of_batch(self, compute: Callable[[], Result], batch: Examples, index: int) -> Result:
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
            if out_of_memory(error):
                raise
            failed = error
        # Outside the handler, so that the traceback has one error.
        outputs = self._outputs_for_batch(batch.arguments, index)
        examples = self._check(outputs, batch, index)
        try:
            self._weights(outputs.detach(), examples)
        except ValueError as error:
            raise ValueError(f"Batch {index}: {error}") from None
        raise failed

    def _outputs_for_batch(self, arguments: Call, index: int) -> Any:
        """The model's outputs for a whole batch; an error has a note with the batch."""
        try:
            return arguments(self.model)
        except Exception as error:
            shapes = listed_shapes(arguments.labelled())
            error.add_note(f"The model was called with batch {index}: {shapes}.")
            raise

    def _by_effort(self, batch: Examples, at_once: int, index: int) -> Tensor | None:
        """The order of the examples by the number of vectors that they need."""
        if not self.estimator.varies:
            return None
        needed = []
        for start in range(0, len(batch), at_once):
            examples = batch[start : start + at_once]
            outputs = examples.arguments(self.model)
            examples, outputs = self._check(outputs, examples, index), outputs.detach()
            weights = self._weights(outputs, examples)
            needed.append(self.estimator.vectors_needed(self.likelihood, outputs, weights))
        return torch.cat(needed).argsort()

    def _check_independence(self, batch: Examples, index: int) -> None:
        """Check that examples have the same outputs alone as together with a few others.

        The first and the last example are tested.  A recurrence over the examples does not
        change the first, and a reversed one does not change the last.

        Raises:
            ValueError: an example has other outputs alone.
        """
        few, count = batch.arguments[:FEW], min(FEW, len(batch))
        failed: Exception | None = None
        try:
            together, first, last = (
                examples(self.model) for examples in (few, few[:1], few[count - 1 : count])
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            failed = error
        if failed is not None:
            # Raises the error if it is due to the network itself, or to the batch; outside the
            # handler, so that the traceback has one error.
            self._outputs_for_batch(batch.arguments, index)
            reason = str(failed).partition("\n")[0]
            raise ValueError(
                f"Batch {index}: the model fails for the first {count} examples or for one "
                f"alone ({reason}), but not for the whole batch. {few.independence}"
            ) from failed
        if not is_real(together) or together.shape[:1] != (count,):
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
                    f"alone and {list(batched.shape)} in its batch. {few.independence}"
                )
            if same(alone, batched, spread):
                continue
            # Outputs may differ without an effect on the likelihood, as by a shift of logits.
            one, other = (
                self._vectors(
                    outputs,
                    self._check(outputs, batch[place : place + 1], index),
                    torch.Generator(),
                )[0]
                for outputs in (alone, batched)
            )
            # A loss has no such outputs, and its score vectors are all the same.
            differs = self.estimator.loss is not None or not same(one, other)
            if differs and reproducible(self.model, few):
                raise ValueError(
                    f"Batch {index}: example {place} has other outputs alone than in its "
                    f"batch. {few.independence}"
                )

    def _scored(
        self, examples: Examples, generator: torch.Generator, index: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The outputs for a set of examples, their score vectors and their weights ``[n]``.

        On a CPU without the vectors that are 0 for all of these examples, as those of positions
        that do not count.  An accelerator would wait for the answer.
        """
        outputs = examples.arguments(self.model)
        scores, weights = self._scores(outputs, examples, generator, index)
        if outputs.dim() > 2 and not sizes_for(scores.device).waits:
            kept = scores.flatten(1).any(1)
            # One at least: K-FAC's input factor has the examples without vectors too.
            kept[:1] = True
            scores = scores[kept]
        # An example counts as often as the one of its observations that counts most.
        return outputs, scores, None if weights is None else weights.flatten(1).amax(1)

    def _check(self, outputs: Any, examples: Examples, index: int) -> Examples:
        """Check the outputs and the targets of a set of examples of a batch.

        Returns:
            The examples.  On an accelerator impossible targets are replaced, because a wrong
            index would end the process before the error is read.
        """
        check_outputs(outputs, len(examples), index)
        if self.estimator.loss is not None:
            return examples
        try:
            self.likelihood.check_outputs(outputs)
            if self.estimator.uses_targets or self.likelihood.needs_targets(outputs):
                return self._with_possible_targets(outputs, examples, index)
        except ValueError as error:
            raise ValueError(f"Batch {index}: {error}") from None
        return examples

    def _with_possible_targets(self, outputs: Tensor, examples: Examples, index: int) -> Examples:
        """The examples with targets that can belong to the outputs; others are faults."""
        targets, likelihood = self._targets(examples), self.likelihood
        if not sizes_for(targets.device).waits:
            likelihood.check_targets(outputs, targets)
            return examples
        likelihood.check_target_shape(outputs, targets)
        wrong = likelihood.impossible(outputs.detach(), targets)
        if wrong is None:
            likelihood.check_targets(outputs, targets)
            return examples
        unfit = ValueError(f"a target does not fit {likelihood}, as its check_targets() says.")
        self.faults.add(wrong.any(), index, unfit)
        return replace(examples, targets=targets.masked_fill(wrong, 0))

    def _targets(self, examples: Examples) -> Tensor:
        """The targets of a set of examples that need them.

        Raises:
            ValueError: there are none.
        """
        if examples.targets is None:
            raise ValueError(
                f"{self.likelihood} needs targets for these outputs: a dict must have them "
                f"under {LABELS!r}."
            )
        return examples.targets

    def _vectors(
        self, outputs: Tensor, examples: Examples, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The estimator's score vectors, and the weights of the observations in them."""
        weights = self._weights(outputs, examples)
        scores = self.estimator.score_vectors(
            self.likelihood, outputs, examples.targets, generator, weights
        )
        return scores, weights

    def _weights(self, outputs: Tensor, examples: Examples) -> Tensor | None:
        """How often the observations count, in a shape that multiplies the outputs."""
        if self.estimator.loss is not None:
            return None if examples.weights is None else examples.weights[:, None]
        return self.likelihood.combined_weights(outputs, examples.targets, examples.weights)

    def _scores(
        self, outputs: Any, examples: Examples, generator: torch.Generator, index: int
    ) -> tuple[Tensor, Tensor | None]:
        """The estimator's score vectors ``[k, n, ...]`` and weights, for checked targets."""
        examples = self._check(outputs, examples, index)
        try:
            scores, weights = self._vectors(outputs.detach(), examples, generator)
        except ValueError as error:
            raise ValueError(f"Batch {index}: {error}") from None
        if self.estimator.loss is not None:
            wrong = outputs.detach().isfinite().all().logical_not()
            fault = NOT_FINITE_LOSS
        else:
            wrong = outputs.detach().isnan().any() | scores.isfinite().all().logical_not()
            fault = NOT_FINITE
        with explained(self.model, examples.arguments):
            self.faults.add(wrong, index, fault)
        return scores, weights

    def _needs(self, one: Examples, index: int) -> "Needs":
        """What one example needs of memory."""
        saved, outputs = saved_bytes(lambda: one.arguments(self.model), self.parameters)
        check_outputs(outputs, 1, index)
        needed = self.estimator.bytes_per_example(outputs)
        if needed > max(self.memory, LEAST_FOR_SCORES):
            sizes = " x ".join(map(str, outputs.shape[1:]))
            raise ValueError(
                f"{self.estimator} of {sizes} outputs takes about "
                f"{needed / 2**20:.0f} MiB for the score vectors of one example, and memory is "
                f"{self.memory / 2**20:.0f} MiB: take MonteCarlo(num_samples), which has fewer "
                "vectors, or increase memory."
            )
        scores, _ = self._scores(outputs, one, torch.Generator(), index)
        gradients = [0]
        if scores.shape[0] and outputs.requires_grad:
            tape = Tape(self.model, self.parameters, one.arguments, outputs, self.seen)
            gradients = tape.bytes_of_gradients(scores[0])
        k, c = scores.shape[0], outputs.numel()
        # Per vector and example: the gradients, the same again for intermediate results, and
        # the score vector itself with its intermediate results.
        vector = 2 * sum(gradients) + 4 * c * outputs.element_size()
        return Needs(saved, k, vector, max(gradients), sizes_for(outputs.device))


@dataclass(frozen=True)
class Needs:
    """What one example needs of memory.

    Attributes:
        saved: the bytes that a forward pass stores for its derivative.
        vectors: the number of score vectors.
        vector: the bytes of a vector's gradients and of what is computed for them.
        gradient: the bytes of a vector's largest gradient.
        sizes: the sizes of pieces of work on the device.
    """

    saved: int
    vectors: int
    vector: int
    gradient: int
    sizes: Sizes

    def fitting(self, memory: int) -> tuple[int, int]:
        """The examples and the vectors that fit into so many bytes."""
        # The other half of the memory is for what is computed from the gradients.
        room = memory // 2
        examples = room // max(1, self.saved + self.vectors * self.vector)
        vectors = self.vectors if examples else max(1, (room - self.saved) // self.vector)
        if self.sizes.gradients is not None:
            most = self.sizes.gradients // max(1, self.vectors * self.gradient)
            examples = min(examples, most)
        if self.sizes.examples is not None:
            examples = min(examples, self.sizes.examples)
        return int(max(1, examples)), int(vectors)


def _shapes_of(one: Examples) -> tuple[torch.Size, ...]:
    """The shapes of the inputs of one example."""
    return tuple(tensor.shape for tensor in one.arguments.tensors())


def is_real(outputs: Any) -> TypeGuard[Tensor]:
    """Whether the outputs of a model are a tensor of real floating-point numbers."""
    return isinstance(outputs, Tensor) and outputs.is_floating_point()


def check_outputs(outputs: Any, num_examples: int, index: int) -> None:
    """Check that the outputs of a model for the examples of a batch are ``[n, ...]``.

    Raises:
        ValueError: the outputs are something else.
    """
    if not is_real(outputs):
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"Batch {index}: the model returned outputs of type {kind}: it must return a "
            "floating-point tensor of shape [n, ...] for n examples."
        )
    if outputs.dim() and len(outputs) == num_examples:
        return
    fix = ", for a single example too" if num_examples == 1 else ""
    raise ValueError(
        f"Batch {index}: the model returned outputs of shape {list(outputs.shape)} for "
        f"{num_examples} example{'s' * (num_examples > 1)}: it must return shape [n, ...] "
        f"for n examples{fix}."
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
