"""One forward pass, and how score vectors are pulled back through it.

Gradients are taken with respect to the results of the operations that use parameters, for
all score vectors at once; no gradient of a weight is ever formed by autograd.

A rule is trusted only where it is known to be right: every use of the parameter in the
graph must be one that a rule knows, and every row of its result must belong to one
example.  Which one is seen from the gradients themselves: when the scores of each example
are scaled by a factor of its own, so are its rows.  It is looked at once for every
structure of the graph that comes up, and in every batch where the structure does not
decide it.  All other parameters go to :class:`~ewc.pullback.per_example.PerExample`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ewc.parameters import Parameters, Shapes, accumulation_dtype
from ewc.pullback.agreement import agree
from ewc.pullback.arguments import Arguments
from ewc.pullback.backward import all_together, one_by_one
from ewc.pullback.graph import Graph, GraphStructure, Uses, alike, place_in_memory
from ewc.pullback.outer import OuterProducts
from ewc.pullback.per_example import PerExample
from ewc.pullback.pullback import Pullback, Summed
from ewc.pullback.rows import BATCH_FIRST, Rows, matching_rows, possible_rows, row_noise
from ewc.pullback.rules.broadcast import Broadcast
from ewc.pullback.rules.convolution import Convolution
from ewc.pullback.rules.embedding import Embedding
from ewc.pullback.rules.matrix_product import MatrixProduct
from ewc.pullback.rules.normalisation import Normalisation
from ewc.pullback.rules.operation import Operation

RULES: dict[str, type[Operation]] = {
    kind: rule
    for rule in (MatrixProduct, Convolution, Normalisation, Broadcast, Embedding)
    for kind in rule.kinds
}
"""The rule of each kind of node."""

FEW = 4
"""Examples on which a graph is tried out."""

MANY_FACTORS, FEW_FACTORS = 16, 4
"""By how many powers of 2 examples are told apart in one pass; few where there is noise."""

NEARLY_EXACT = 1e-6
"""Noise up to which rows that are ``2 ** MANY_FACTORS`` apart are seen beside each other."""

Signature = bytes
"""What decides the rows of a graph's operations: its structure, and its uses of parameters."""


@dataclass
class KnownGraphs:
    """What is known of a network's graphs from batch to batch.

    Attributes:
        rows: of every structure of the graph seen so far, the rows of its operations;
            ``None`` for an operation whose rows are not the examples in order.
        together: of every kind of graph and number of vectors seen so far, whether pulling
            the vectors back at once was seen to be right, and fast.
        kinds: of every structure seen so far, its kind: the structure for a few examples,
            where that is the same but for their number.
        vectorises: see :class:`~ewc.pullback.per_example.PerExample`.
        noise: how much the arithmetic changes a row from one time to the next
            (:func:`~ewc.pullback.rows.row_noise`); ``None`` before it was measured.
        constants: where the network's own tensors are, which are the same in every batch.
    """

    rows: dict[Signature, list[Rows | None]] = field(default_factory=dict)
    together: dict[tuple[Signature, int], bool] = field(default_factory=dict)
    kinds: dict[Signature, Signature] = field(default_factory=dict)
    vectorises: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    noise: float | None = None
    constants: set[int] | None = None


class Tape:
    """The graph of one forward pass.

    Args:
        model: the network.
        parameters: those of its parameters whose Fisher information is wanted.
        arguments: what the network was called with.
        outputs: what it returned, ``[n, c]``.
        memory: what earlier passes found out.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        arguments: Arguments,
        outputs: Tensor,
        memory: KnownGraphs,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.arguments = arguments
        self.outputs = outputs
        self.memory = memory
        self.num_examples = outputs.shape[0]
        self.graph = graph = Graph(outputs)
        uses = graph.uses(parameters)
        operations = operations_of(graph, uses)
        self.uses = uses  # without additions that a product took in, which move no rows
        # A layer that is called on no rows has no part in the outputs.
        self.operations = [o for o in operations if prod(o.output._input_metadata[0].shape)]
        idle = {view.name for o in operations if o not in self.operations for view in o.views}
        idle -= {view.name for o in self.operations for view in o.views}
        self.present = [n for n, p in parameters.items() if id(p) in graph.leaves and n not in idle]

    @cached_property
    def structure(self) -> GraphStructure:
        """All that the graph shows but the values of tensors."""
        return self.graph.structure()

    @cached_property
    def signature(self) -> Signature:
        """What decides the rows of the operations where their layout lasts.

        A digest: a network may have another structure for every length of its inputs.
        """
        used = tuple(tuple((v.name, v.first) for v in o.views) for o in self.operations)
        shown = repr((self.num_examples, used, self.structure))
        return blake2b(shown.encode(), digest_size=16).digest()

    @property
    def _kind(self) -> Signature:
        """The structure without the number of examples: batches of two sizes have one kind."""
        if self.signature not in self.memory.kinds:
            self.memory.kinds[self.signature] = self._few.signature
        return self.memory.kinds[self.signature]

    @property
    def lasting(self) -> bool:
        """Whether the rows are the same in every batch whose graph has this structure."""
        if self.memory.constants is None:
            own = (*self.model.parameters(), *self.model.buffers())
            self.memory.constants = {place_in_memory(tensor) for tensor in own} - {0}
        return not self.graph.moves_rows(self.uses, self.num_examples, self.memory.constants)

    @property
    def edges(self) -> list[GradientEdge]:
        """Where the operations' results are in the graph."""
        return [GradientEdge(operation.output, 0) for operation in self.operations]

    def bytes_of_gradients(self, score: Tensor) -> list[int]:
        """What the gradients of one score vector ``[n, c]`` take, by operation."""
        if not self.operations:
            return [0]
        gradients = one_by_one(self.outputs, self.edges, score[None], retain_graph=True)
        return [g.numel() * accumulation_dtype(g.dtype).itemsize for g in gradients]

    def pullbacks(
        self, scores: Tensor, vectors_at_once: int, memory: int
    ) -> Iterator[list[Pullback]]:
        """The score vectors pulled back, some at a time.

        Args:
            scores: ``[k, n, c]``.
            vectors_at_once: how many to pull back together.
            memory: bytes that intermediate results may take.

        Yields:
            For each part of the vectors, pullbacks that together hold every parameter
            that takes part in the outputs, each once.
        """
        layouts = dict(zip(map(id, self.operations), self._rows(scores), strict=True))
        irregular = [operation for operation in self.operations if layouts[id(operation)] is None]
        unknown = {view.name for operation in irregular for view in operation.views}
        self.operations = restricted(self.operations, unknown)
        covered = {view.name for operation in self.operations for view in operation.views}
        others = {n: self.parameters[n].shape for n in self.present if n not in covered}
        for start in range(0, scores.shape[0], vectors_at_once):
            part = scores[start : start + vectors_at_once]
            last = start + vectors_at_once >= scores.shape[0]
            found: list[Pullback] = []
            if self.operations:
                gradients = self._pulled_back(part, retain_graph=not last)
                for operation, gradient in zip(self.operations, gradients, strict=True):
                    dtype = self.parameters[operation.views[0].name].dtype
                    g = operation.rows_of(gradient.to(accumulation_dtype(dtype)))
                    rows = layouts[id(operation)]
                    assert rows is not None
                    found += operation.pullbacks(g, rows, self.num_examples, memory)
            if others:
                found.append(self._one_at_a_time(others, part, memory, misplaced=bool(irregular)))
            yield merged(found)

    def _pulled_back(self, scores: Tensor, *, retain_graph: bool) -> list[Tensor]:
        """Gradients with respect to the operations' results, all vectors together if it pays."""
        key = self._kind, len(scores)
        if len(scores) > 1 and self.memory.together.get(key, True):
            found = all_together(self.outputs, self.edges, scores)
            if key not in self.memory.together:
                self.memory.together[key] = found is not None and self._right(found, scores)
            if found is not None and self.memory.together[key]:
                return found
        return one_by_one(self.outputs, self.edges, scores, retain_graph=retain_graph)

    def _one_at_a_time(
        self, shapes: Shapes, scores: Tensor, memory: int, *, misplaced: bool
    ) -> PerExample:
        return PerExample(
            self.model,
            shapes,
            self.arguments,
            scores,
            memory=memory,
            vectorises=self.memory.vectorises,
            misplaced=misplaced,
        )

    def _right(self, found: list[Tensor], scores: Tensor) -> bool:
        """Whether vectors that were pulled back together are right; some rules for vmap are not.

        Pulling back is linear: a combination of the vectors must give theirs.
        """
        weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
        weights = weights.to(scores)
        score = torch.einsum("k,knc->nc", weights, scores)[None]
        plain = one_by_one(self.outputs, self.edges, score, retain_graph=True)
        noise = self.memory.noise or 0.0
        return all(
            agree(torch.tensordot(weights.to(g.dtype), g, 1), h[0], noise)
            for g, h in zip(found, plain, strict=True)
        )

    # --- which example a row belongs to -------------------------------------------------

    @cached_property
    def _few(self) -> "Tape":
        """The tape of some of the examples, if its graph is the same; else this one."""
        if self.num_examples <= FEW:
            return self
        some = self.arguments[:FEW]
        with torch.enable_grad():
            outputs = some(self.model)
        if not isinstance(outputs, Tensor) or outputs.shape != self.outputs[:FEW].shape:
            return self
        tape = Tape(self.model, self.parameters, some, outputs, self.memory)
        same = alike(tape.structure, self.structure, FEW, self.num_examples)
        return tape if same else self

    def _rows(self, scores: Tensor) -> list[Rows | None]:
        """The rows of every operation, found out if this structure of the graph is new."""
        if self.num_examples == 1:
            return [BATCH_FIRST] * len(self.operations)
        if not self.lasting:
            return self.probed(scores)[0]
        if self.signature in self.memory.rows:
            return self.memory.rows[self.signature]
        rows = self.memory.rows.get(self._kind)
        if rows is None:
            rows, certain = self._few.probed(scores)
            if certain:
                self.memory.rows[self._kind] = rows
            elif self._few is not self:
                rows, certain = self.probed(scores)
            if not certain:
                return rows
        self.memory.rows[self.signature] = rows
        return rows

    def probed(self, scores: Tensor) -> tuple[list[Rows | None], bool]:
        """The rows of every operation, and whether they are the same for other batches.

        They are if there is no other way to read the gradients of this one.
        """
        if not self.operations:
            return [], True
        n = self.num_examples
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(scores.shape[0], n, generator=generator).to(scores)
        score = torch.einsum("kn,knc->nc", weights, scores[:, :n])
        # Examples of one size: none hides in the rounding of the others.
        score = torch.nn.functional.normalize(score, eps=torch.finfo(score.dtype).tiny)
        plain = self._rows_of(score)
        if self.memory.noise is None:
            again = self._rows_of(score)
            self.memory.noise = max(map(row_noise, plain, again))
        layouts = [possible_rows(len(gradient), n) for gradient in plain]
        # Every example has a number of its own, and is scaled by its digits one after the
        # other. Noise must stay below the rows of the least factor.
        exact = self.memory.noise < NEARLY_EXACT and score.dtype.itemsize > 2
        base = MANY_FACTORS if exact else FEW_FACTORS
        numbers = torch.randperm(n, generator=generator)
        while True:
            factors = 2.0 ** (numbers % base).to(score)
            scaled = self._rows_of(factors[:, None] * score)
            for place, (before, after) in enumerate(zip(plain, scaled, strict=True)):
                layouts[place] = matching_rows(
                    layouts[place], before, after, factors, self.memory.noise
                )
            numbers = numbers // base
            if not numbers.any():
                break
        certain = all(len(found) < 2 for found in layouts) and all(g.any() for g in plain)
        return [found[0] if found else None for found in layouts], certain

    def _rows_of(self, score: Tensor) -> list[Tensor]:
        """The rows of all operations' gradients for one score vector an example, ``[n, c]``."""
        gradients = one_by_one(self.outputs, self.edges, score[None], retain_graph=True)
        pairs = zip(self.operations, gradients, strict=True)
        return [operation.rows_of(gradient)[0] for operation, gradient in pairs]


def operations_of(graph: Graph, uses: Uses) -> list[Operation]:
    """The operations that together are all uses of some of the parameters."""
    found: list[Operation] = []
    unknown: set[str] = set()
    # Products come first: they take in the biases that are added to them.
    for node in sorted(uses, key=lambda node: type(node).__name__ not in MatrixProduct.kinds):
        views = uses.get(node)
        if views is None:
            continue
        rule = RULES.get(type(node).__name__)
        complex_ = node._input_metadata[0].dtype.is_complex
        operation = None if rule is None or complex_ else rule.of(node, uses, graph)
        if operation is None:
            unknown |= {view.name for view in views.values()}
        else:
            found.append(operation)
    return restricted(found, unknown)


def restricted(operations: Sequence[Operation], unknown: set[str]) -> list[Operation]:
    """The operations without the parameters in ``unknown``."""
    for operation in operations:
        operation.keep({view.name for view in operation.views} - unknown)
    return [operation for operation in operations if operation.views]


def merged(pullbacks: Sequence[Pullback]) -> list[Pullback]:
    """The same pullbacks, with all that share a parameter put into one."""
    groups: list[list[Pullback]] = []
    for pullback in pullbacks:
        names = pullback.shapes.keys()
        touching = [g for g in groups if any(names & other.shapes.keys() for other in g)]
        groups = [g for g in groups if g not in touching]
        groups.append([other for g in touching for other in g] + [pullback])
    return [group[0] if len(group) == 1 else _combined(group) for group in groups]


def _combined(group: Sequence[Pullback]) -> Pullback:
    """Pullbacks that share parameters, as one."""
    first = group[0]
    if isinstance(first, OuterProducts):
        key = (first.weight, first.bias, first.layout)
        same = [p for p in group if isinstance(p, OuterProducts)]
        if len(same) == len(group) and all((p.weight, p.bias, p.layout) == key for p in same):
            uses = [use for p in same for use in p.uses]
            return OuterProducts(*key, uses, first.memory)
    return Summed(group)
