r"""The pass over the data that makes a Fisher matrix."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ewc.checks import is_whole
from ewc.fisher.accumulator import Accumulator, Configured
from ewc.fisher.agreement import same
from ewc.fisher.arguments import Arguments, Caller, listed_shapes
from ewc.fisher.diagonal import DiagonalFisher
from ewc.fisher.distributed import anywhere, joined, rank_in
from ewc.fisher.estimators import Estimator, Exact, check_estimator
from ewc.fisher.evaluation import dense_parts, plain_operations, undisturbed
from ewc.fisher.graph import Graph
from ewc.fisher.matrix import FisherMatrix, check_structure
from ewc.fisher.per_example import INDEPENDENT, reproducible
from ewc.fisher.pullback import DEFAULT_MEMORY, Chunk
from ewc.fisher.tape import Memory, Tape
from ewc.likelihoods import Categorical, Likelihood, check_likelihood
from ewc.parameters import Parameters, Selection, selected_parameters
from ewc.wrappers import unwrapped

Structure = TypeVar("Structure", bound=FisherMatrix)
Found = TypeVar("Found")

EXAMPLES_AT_ONCE = 512
"""Larger batches are cut: products this tall are as fast, and their results stay in cache."""

CACHE = 2**24
"""Bytes up to which the gradients of one operation stay in a processor's last cache."""

FEW = 8
"""Examples of which it is seen whether they depend on each other."""

LEAST_FOR_SCORES = 2**24
"""Bytes that the score vectors of one example may always take."""

SORTED_AT_ONCE = 64
"""Where examples need more or fewer vectors, those that need as many go together."""


def fisher_information(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood = Categorical(),
    *,
    estimator: Estimator = Exact(),
    structure: type[Structure] | Configured[Structure] = DiagonalFisher,  # type: ignore[assignment]
    parameters: Sequence[Selection] | None = None,
    memory: int = DEFAULT_MEMORY,
    group: ProcessGroup | None = None,
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
            ``x`` may be a dict of tensors: it goes by name to a model that has arguments
            of these names, else as one argument.  It may also be
            :class:`~ewc.fisher.arguments.Arguments`, which the model is called with as
            they are.  :class:`Exact` and :class:`MonteCarlo` take targets of their own: there
            ``y`` may be any tensor with a row an example.
        likelihood: what the outputs mean.
        estimator: how the expectation over targets is taken.
        structure: what of the matrix to keep: a class, or one with options, such as
            ``LowRankFisher.configured(rank=50)``.
        parameters: restricts the matrix to some parameters: their names, patterns such as
            ``"head.*"``, modules, or the parameters themselves; all that require a
            gradient if ``None``.
        memory: bytes that intermediate results (activations, gradients, products) may
            take, as long as one example fits; the batches are cut accordingly.
        group: processes of ``torch.distributed`` that hold a shard of the data each; all
            of them get the matrix of the whole data.  A :class:`MonteCarlo` draws other
            targets in every process.

    Returns:
        The matrix over the chosen parameters with ``requires_grad``, on their device.

    Raises:
        ValueError: the data are empty or no batches, a target that the estimator uses does
            not fit the outputs, the outputs are not ``[n, c]``, a BatchNorm has no running
            statistics (its examples are not independent), or no parameter is trainable or
            chosen, or none of them has a part in the outputs; the score vectors of one example
            do not fit into memory; the data are an iterator where the structure needs two passes.
        FloatingPointError: the outputs, or the scores they give, are not finite.
        TypeError: the likelihood, the estimator or the structure is none.
    """
    check_likelihood(likelihood)
    check_estimator(estimator)
    check_structure(structure)
    if not is_whole(memory) or memory < 1:
        raise ValueError(f"memory must be a whole number of bytes above 0, got {memory!r}.")
    chosen = selected_parameters(model, parameters)
    with unwrapped(model) as bare, undisturbed(bare), plain_operations(bare):
        total = structure.accumulator(chosen)
        if total.passes > 1 and iter(data) is data:
            raise ValueError(
                f"The data are a {type(data).__name__}, which can be read once: this structure "
                f"needs {total.passes} passes, so give a list of batches or a DataLoader."
            )
        while True:
            with torch.enable_grad():
                network = Network(bare, chosen, likelihood, estimator, memory)
                num_examples = network.summed_up(data, total, rank_in(group))
            if group is not None:
                num_examples = joined(total, num_examples, group)
            if num_examples == 0:
                raise ValueError("The data are empty: the Fisher information needs an example.")
            if not anywhere(network.depends, group):
                raise ValueError(
                    f"The outputs of {type(model).__name__} depend on none of the parameters "
                    f"({', '.join(list(chosen)[:3])}{', ...' if len(chosen) > 3 else ''}): its "
                    "forward must not run under torch.no_grad() or inference_mode() nor detach "
                    "its results, and a chosen parameter must take part in them."
                )
            with torch.no_grad():
                check_finite(total.sums())
                found = total.mean(num_examples)
            if isinstance(found, FisherMatrix):
                return found  # type: ignore[return-value]
            total = found


class Network:
    """A model with what is known of it once its first batch has been seen."""

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
        self.seen = Memory()
        self.independent = False
        """Whether examples were seen to give alone what they give in their batch."""
        self.depends = False
        """Whether some outputs depend on some of the parameters."""
        self.fitting: dict[tuple[torch.Size, ...], tuple[int, int]] = {}
        """How many examples and score vectors fit into memory at once, by the inputs' shapes."""

    def summed_up(self, data: Iterable[Any], total: Accumulator, rank: int) -> int:
        """Add all the data to ``total``; returns the number of examples."""
        # Every process draws targets of its own.
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
            part = slice(start, start + at_once)
            some = arguments[part]
            outputs, scores = self._of_batch(
                partial(self._scored, some, targets[part], generator, index),
                arguments,
                targets,
                index,
            )
            yield self._chunk(some, outputs, scores, vectors_at_once)

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
        return Chunk(self.model, arguments, scores, pullbacks, alone)

    def _alone(self, arguments: Arguments, scores: Tensor, vectors_at_once: int) -> Iterator[Chunk]:
        """The examples of a chunk one by one."""
        for i in range(len(arguments)):
            one = arguments[i : i + 1]
            with torch.enable_grad():
                outputs = one(self.model)
            yield self._chunk(one, outputs, scores[:, i : i + 1], vectors_at_once)

    def _of_batch(
        self, part: Callable[[], Found], arguments: Arguments, targets: Tensor, index: int
    ) -> Found:
        """What comes of a part of a batch; an error names the sizes of the whole batch.

        Raises:
            Exception: what the whole batch raises where a part of it failed; if it raises
                nothing, what the part did.
        """
        try:
            return part()
        except FloatingPointError:
            raise
        except Exception as error:
            failed = error
        # Outside of the handler, so that the user sees one error.
        self._check(self._outputs_for_batch(arguments, index), targets, index)
        raise failed

    def _outputs_for_batch(self, arguments: Arguments, index: int) -> Any:
        """What the model returns for a whole batch; an error of its own says for which."""
        try:
            return arguments(self.model)
        except Exception as error:
            shapes = listed_shapes(arguments.labelled())
            error.add_note(f"The model was called with batch {index}: {shapes}.")
            raise

    def _by_effort(self, arguments: Arguments, at_once: int) -> Tensor | None:
        """The examples by how many vectors they need, so that few get more than that."""
        if not self.estimator.varies:
            return None
        needed = []
        for start in range(0, len(arguments), at_once):
            outputs = arguments[start : start + at_once](self.model).detach()
            needed.append(self.estimator.vectors_needed(self.likelihood, outputs))
        return torch.cat(needed).argsort()

    def _check_independence(self, arguments: Arguments, targets: Tensor, index: int) -> None:
        """Check that examples give alone what they give together with a few others.

        The first and the last of them: a recurrence over the examples leaves the first as
        it is, and a reversed one the last.

        Raises:
            ValueError: they do not.
        """
        few, count = arguments[:FEW], min(FEW, len(targets))
        try:
            together, first, last = (
                some(self.model) for some in (few, few[:1], few[count - 1 : count])
            )
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            # A fault of the network itself, or of the batch, shows here.
            self._outputs_for_batch(arguments, index)
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"Batch {index}: the model takes the batch, but fails for its first {count} "
                f"examples or for one alone ({reason}). {INDEPENDENT}"
            ) from error
        if not is_real(together) or len(together) != count:
            return  # Which is said where the whole batch is looked at.
        together = together.detach()
        spread = float((together - together.mean(0)).norm()) / count**0.5
        for place, alone in ((0, first.detach()), (count - 1, last.detach())):
            there = together[place : place + 1]
            if alone.dim() != there.dim() or alone.isnan().any() or there.isnan().any():
                continue
            if alone.shape != there.shape:
                raise ValueError(
                    f"Batch {index}: example {place} alone has outputs of shape "
                    f"{list(alone.shape)}, and {list(there.shape)} in its batch. {INDEPENDENT}"
                )
            if same(alone, there, spread):
                continue
            # Outputs may differ by what the likelihood does not see, such as a shift of logits.
            one, other = (
                self.estimator.score_vectors(
                    self.likelihood, outputs, targets[place : place + 1], torch.Generator()
                )
                for outputs in (alone, there)
            )
            if not same(one, other) and reproducible(self.model, few):
                raise ValueError(
                    f"Batch {index}: example {place} alone has other outputs than in its "
                    f"batch. {INDEPENDENT}"
                )

    def _scored(
        self, arguments: Arguments, targets: Tensor, generator: torch.Generator, index: int
    ) -> tuple[Tensor, Tensor]:
        """The outputs for some examples and their score vectors."""
        outputs = arguments(self.model)
        return outputs, self._scores(outputs, targets, generator, index)

    def _check(self, outputs: Any, targets: Tensor, index: int) -> None:
        """Check the outputs and the targets of some examples of a batch."""
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
        """The estimator's score vectors ``[k, n, c]``, after checking what they come from."""
        self._check(outputs, targets, index)
        scores = self.estimator.score_vectors(self.likelihood, outputs.detach(), targets, generator)
        if bool(outputs.isnan().any()) or not bool(scores.isfinite().all()):
            raise FloatingPointError(
                f"Batch {index}: the scores of the model's outputs are not finite, so the "
                "Fisher information is not defined; check the parameters and the inputs."
            )
        return scores

    def _fitting(self, one: Arguments, target: Tensor, index: int) -> tuple[int, int]:
        """How many examples and vectors fit into memory at once, seen from one example."""
        saved, outputs = saved_bytes(lambda: one(self.model), self.parameters)
        check_outputs(outputs, 1, index)
        needed = self.estimator.bytes_per_example(outputs)
        if needed > max(self.memory, LEAST_FOR_SCORES):
            raise ValueError(
                f"{self.estimator} of {outputs.shape[1]} outputs takes about "
                f"{needed / 2**20:.0f} MiB for the score vectors of one example, and memory is "
                f"{self.memory / 2**20:.0f} MiB: take MonteCarlo(num_samples), whose vectors are "
                "few, or give more memory."
            )
        scores = self._scores(outputs, target, torch.Generator(), index)
        gradients = [0]
        if scores.shape[0] and outputs.requires_grad:
            tape = Tape(self.model, self.parameters, one, outputs, self.seen)
            gradients = tape.bytes_of_gradients(scores[0])
        k, c = scores.shape[0], outputs.numel()
        # For a vector of an example: the gradients, as much again on the way, and the
        # vector itself with what it takes to make it.
        vector = 2 * sum(gradients) + 4 * c * outputs.element_size()
        # The other half is for what is made of the gradients.
        room = self.memory // 2
        examples = room // max(1, saved + k * vector)
        vectors = k if examples else max(1, (room - saved) // vector)
        if outputs.device.type == "cpu":
            examples = min(examples, CACHE // max(1, k * max(gradients)))
        return int(max(1, min(EXAMPLES_AT_ONCE, examples))), int(vectors)


def check_finite(sums: dict[str, Tensor]) -> None:
    """Check that every sum is a finite number.

    Raises:
        FloatingPointError: one is not: a derivative of the network does not exist there.
    """
    for name, total in sums.items():
        # The extremes are NaN where an entry is, and take no memory of the sum's size.
        if total.numel() and not bool(torch.stack(torch.aminmax(total)).isfinite().all()):
            raise FloatingPointError(
                f"The Fisher information of {name} is not finite: a derivative of the network "
                "is infinite or undefined for some example, or too large for its type."
            )


def is_real(outputs: Any) -> TypeGuard[Tensor]:
    """Whether what a model returned are real numbers in a tensor."""
    return isinstance(outputs, Tensor) and outputs.is_floating_point()


def check_outputs(outputs: Any, num_examples: int, index: int) -> None:
    """Check that a model returned outputs ``[n, c]`` for the examples of a batch.

    Raises:
        ValueError: it returned something else.
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
        fix = "; for one output an example, return outputs[:, None]"
    elif num_examples == 1:
        fix = ", for a single example too"
    raise ValueError(
        f"Batch {index}: the model returned outputs of shape {list(outputs.shape)} for "
        f"{num_examples} example{'s' * (num_examples > 1)}: it must return shape [n, c] for n "
        f"examples{fix}."
    )


def saved_bytes(forward: Callable[[], Any], parameters: Parameters) -> tuple[int, Any]:
    """The bytes that a forward pass keeps for its derivative, and what it returns."""
    own = {p.untyped_storage().data_ptr() for p in parameters.values()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in dense_parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = forward()
    except RuntimeError:
        # Derivatives that torch.func takes inside of the network allow no hooks: all results
        # count. A fault of the network itself shows again here.
        outputs = forward()
        return Graph(outputs).bytes_of_results(), outputs
    return sum(sizes.values()), outputs
