"""One forward pass, and score vectors pulled back through it.

Gradients are taken with respect to the results of the operations that use parameters, for
all score vectors at once.  Autograd never forms the gradient of a weight.

A rule is applied only where it is right.  Every use of the parameter in the graph must have
a rule, and every row of the operation's result must belong to one example.  The gradients
show which one: if the scores of each example are scaled by a different factor, so are the
rows of that example.  This is tested once per structure of the graph, and in every batch if
the structure does not determine the order of the rows.  All other parameters go to
:class:`~ewc.pullback.per_example.PerExample`.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from ewc.parameters import Parameters, Shapes, accumulation_dtype
from ewc.pullback.agreement import agree
from ewc.pullback.backward import all_together, one_by_one
from ewc.pullback.call import Call
from ewc.pullback.derived import behind
from ewc.pullback.graph import Graph, GraphStructure, Uses, alike, place_in_memory
from ewc.pullback.outer import OuterProducts
from ewc.pullback.per_example import PerExample
from ewc.pullback.pullback import Pullback, Summed
from ewc.pullback.recognition import Use, counted, one_at_a_time, warn_of
from ewc.pullback.rows import BATCH_FIRST, Rows, matching_rows, possible_rows, row_noise
from ewc.pullback.rules.broadcast import Broadcast
from ewc.pullback.rules.convolution import Convolution
from ewc.pullback.rules.embedding import Embedding
from ewc.pullback.rules.matrix_product import MatrixProduct
from ewc.pullback.rules.normalisation import Normalisation
from ewc.pullback.rules.operation import Operation
from ewc.pullback.rules.stacked_product import StackedProduct

RULES: dict[str, type[Operation]] = {
    kind: rule
    for rule in (MatrixProduct, StackedProduct, Convolution, Normalisation, Broadcast, Embedding)
    for kind in rule.kinds
}
"""The rule of each kind of node."""

FEW = 4
"""Examples on which a graph is tested."""

ODD = 7
"""A number of examples that few widths are a multiple of."""

MANY_FACTORS, FEW_FACTORS = 16, 4
"""The number of powers of 2 that distinguish examples in one pass; few if there is noise."""

NEARLY_EXACT = 1e-6
"""The largest noise at which rows differing by ``2 ** MANY_FACTORS`` can be compared."""

Signature = bytes
"""A digest of what determines the rows: the graph's structure and its uses of parameters."""


@dataclass
class KnownGraphs:
    """What is known about a network's graphs from earlier batches.

    Attributes:
        rows: the rows of the operations, by structure of the graph.  ``None`` for an
            operation whose rows are not the examples in order.
        together: whether pulling all vectors back at once is right and fast, by kind of
            graph and number of vectors.
        kinds: the kind of every structure.  It is the structure for a few examples, if that
            differs only in the number of examples.
        vectorises: see :class:`~ewc.pullback.per_example.PerExample`.
        noise: the change of a row between two runs (:func:`~ewc.pullback.rows.row_noise`);
            ``None`` before it was measured.
        constants: the addresses of the network's parameters and buffers, which are the same
            in every batch.
        lasting: whether the rows are lasting, by kind of graph, where one number of examples
            does not tell.
        slow: the parameters of which the user was warned.
    """

    rows: dict[Signature, list[Rows | None]] = field(default_factory=dict)
    together: dict[tuple[Signature, int], bool] = field(default_factory=dict)
    kinds: dict[Signature, Signature] = field(default_factory=dict)
    vectorises: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    noise: float | None = None
    constants: set[int] | None = None
    lasting: dict[Signature, bool] = field(default_factory=dict)
    slow: set[str] = field(default_factory=set)


class Tape:
    """The graph of one forward pass.

    Args:
        model: the network.
        parameters: the parameters whose Fisher information is computed.
        arguments: the network's call.
        outputs: its outputs, ``[n, ...]``.
        known: what is known from earlier passes.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        arguments: Call,
        outputs: Tensor,
        known: KnownGraphs,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.arguments = arguments
        self.outputs = outputs
        self.known = known
        self.num_examples = outputs.shape[0]
        self.graph = graph = Graph(outputs)
        uses, self.derived = graph.uses(parameters, self.num_examples, self.constants)
        operations, reasons = operations_of(graph, uses)
        self.uses = uses  # without the additions that became a product's bias: they move no rows
        # A layer that is called on no rows does not affect the outputs.
        self.operations = [o for o in operations if prod(o.output._input_metadata[0].shape)]
        idle = self._behind(o for o in operations if o not in self.operations)
        idle -= self._behind(self.operations)
        self.present = [n for n, p in parameters.items() if id(p) in graph.leaves and n not in idle]
        self.reasons: dict[str, str] = {}  # why parameters have no rule
        self._leave_out(reasons)
        self.misplaced = False  # whether rows of an operation are not the examples in order

    @cached_property
    def structure(self) -> GraphStructure:
        """The graph without the values of tensors."""
        return self.graph.structure()

    @cached_property
    def signature(self) -> Signature:
        """A digest of what determines the rows of the operations, if their layout is lasting.

        A digest, because a network may have a different structure for every input length.
        """
        used = tuple(tuple((v.name, v.first) for v in o.views) for o in self.operations)
        shown = repr((self.num_examples, used, self.structure))
        return blake2b(shown.encode(), digest_size=16).digest()

    @property
    def _kind(self) -> Signature:
        """The structure without the number of examples: batches of any size have one kind."""
        if self.signature not in self.known.kinds:
            self.known.kinds[self.signature] = self._few.signature
        return self.known.kinds[self.signature]

    @property
    def lasting(self) -> bool:
        """Whether the rows are the same in every batch whose graph has this structure.

        A width that is a multiple of the number of examples looks like rows.  So a graph that
        seems to move rows is looked at with another number of examples.
        """
        if not self._moves_rows:
            return True
        if self._kind not in self.known.lasting:
            other = self._resized(ODD)
            self.known.lasting[self._kind] = other is not self and not other._moves_rows
        return self.known.lasting[self._kind]

    @property
    def _moves_rows(self) -> bool:
        return self.graph.moves_rows(self.uses, self.num_examples, self.constants)

    @property
    def constants(self) -> set[int]:
        """The addresses of tensors that are the same in every batch."""
        if self.known.constants is None:
            constants = (*self.model.parameters(), *self.model.buffers())
            self.known.constants = {place_in_memory(tensor) for tensor in constants} - {0}
        return self.known.constants

    @property
    def edges(self) -> list[GradientEdge]:
        """The edges of the graph that are the operations' results."""
        return [GradientEdge(operation.output, 0) for operation in self.operations]

    def bytes_of_gradients(self, score: Tensor) -> list[int]:
        """The bytes of the gradients of one score vector ``[n, ...]``, by operation."""
        if not self.operations:
            return [0]
        gradients = one_by_one(self.outputs, self.edges, score[None], retain_graph=True)
        return [g.numel() * accumulation_dtype(g.dtype).itemsize for g in gradients]

    def pullbacks(
        self, scores: Tensor, vectors_at_once: int, memory: int
    ) -> Iterator[list[Pullback]]:
        """The score vectors pulled back, a block at a time.

        Args:
            scores: ``[k, n, ...]``.
            vectors_at_once: the number of vectors in a block.
            memory: bytes that intermediate results may take.

        Yields:
            The pullbacks of each block.  They have every parameter that affects the outputs
            once.
        """
        layouts = self._regular(scores)
        uncovered = self._uncovered()
        fresh = {n: self.reasons[n] for n in uncovered if n not in self.known.slow}
        self.known.slow |= fresh.keys()
        warn_of(one_at_a_time(fresh))
        for start in range(0, scores.shape[0], vectors_at_once):
            block = scores[start : start + vectors_at_once]
            last = start + vectors_at_once >= scores.shape[0]
            pullbacks: list[Pullback] = []
            if self.operations:
                gradients = self._pulled_back(block, retain_graph=not last)
                for operation, gradient, rows in zip(
                    self.operations, gradients, layouts, strict=True
                ):
                    g = operation.rows_of(gradient.to(self._dtype(operation)))
                    pullbacks += operation.pullbacks(g, rows, self.num_examples, memory)
            if uncovered:
                pullbacks.append(self._one_at_a_time(uncovered, block, memory))
            whole = [
                behind(pullback, self.derived, self.parameters)
                if self.derived.keys() & pullback.shapes.keys()
                else pullback
                for pullback in merged(pullbacks)
            ]
            yield merged(whole)

    def recognised(self, scores: Tensor) -> list[Use]:
        """The uses of the parameters, for score vectors ``[k, n, c]``; the slow ones last."""
        uses = [
            Use(
                tuple(n for view in operation.views for n in self._parameters_of(view.name)),
                operation.label,
                operation.positions(self.num_examples),
                str(rows),
            )
            for rows, operation in zip(self._regular(scores), self.operations, strict=True)
        ]
        return counted(uses) + one_at_a_time(
            {name: self.reasons[name] for name in self._uncovered()}
        )

    def _regular(self, scores: Tensor) -> list[Rows]:
        """The rows of the operations, after those without rows of the examples are left out."""
        layouts = dict(zip(map(id, self.operations), self._rows(scores), strict=True))
        reasons: dict[str, str] = {}
        for operation in self.operations:
            if layouts[id(operation)] is None:
                kind = kind_of(operation.output)
                why = f"the rows of {kind} are not the examples in order"
                reasons |= {view.name: why for view in operation.views}
                self.misplaced = True
        self._leave_out(reasons)
        regular = [layouts[id(operation)] for operation in self.operations]
        return [rows for rows in regular if rows is not None]

    def _behind(self, operations: Iterable[Operation]) -> set[str]:
        """The parameters of operations, also behind derived tensors."""
        return {n for o in operations for view in o.views for n in self._parameters_of(view.name)}

    def _parameters_of(self, name: str) -> tuple[str, ...]:
        """The parameters behind a name in a view."""
        return self.derived[name].parameters if name in self.derived else (name,)

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        """Leave out parameters and derived tensors without a rule, for these reasons."""
        for name, why in reasons.items():
            self.reasons |= dict.fromkeys(self._parameters_of(name), why)
        # A derived tensor is of use as long as one of its parameters is covered.
        for name, tensor in self.derived.items():
            rest = tuple(n for n in tensor.parameters if n not in self.reasons)
            self.derived[name] = replace(tensor, parameters=rest)
        idle = {name for name, tensor in self.derived.items() if not tensor.parameters}
        self.operations = restricted(self.operations, self.reasons.keys() | idle)

    def _dtype(self, operation: Operation) -> torch.dtype:
        """The type of the vectors of an operation's parameters."""
        name, *_ = self._parameters_of(operation.views[0].name)
        return accumulation_dtype(self.parameters[name].dtype)

    def _uncovered(self) -> Shapes:
        """The parameters without a rule for all their uses."""
        return {n: self.parameters[n].shape for n in self.present if n in self.reasons}

    def _pulled_back(self, scores: Tensor, *, retain_graph: bool) -> list[Tensor]:
        """Gradients with respect to the operations' results, all vectors at once if faster."""
        if len(scores) == 1:
            return one_by_one(self.outputs, self.edges, scores, retain_graph=retain_graph)
        key = self._kind, len(scores)
        if self.known.together.get(key, True):
            gradients = all_together(self.outputs, self.edges, scores)
            if key not in self.known.together:
                self.known.together[key] = gradients is not None and self._right(gradients, scores)
            if gradients is not None and self.known.together[key]:
                return gradients
        return one_by_one(self.outputs, self.edges, scores, retain_graph=retain_graph)

    def _one_at_a_time(self, shapes: Shapes, scores: Tensor, memory: int) -> PerExample:
        return PerExample(
            self.model,
            shapes,
            self.arguments,
            scores,
            memory=memory,
            vectorises=self.known.vectorises,
            misplaced=self.misplaced,
        )

    def _right(self, gradients: list[Tensor], scores: Tensor) -> bool:
        """Whether vectors that were pulled back at once are right; some rules for vmap are wrong.

        Pulling back is linear.  So the combination of the gradients must be the gradient of
        the combined score vectors.
        """
        weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
        weights = weights.to(scores)
        score = torch.tensordot(weights, scores, 1)[None]
        plain = one_by_one(self.outputs, self.edges, score, retain_graph=True)
        noise = self.known.noise or 0.0
        return all(
            agree(torch.tensordot(weights.to(g.dtype), g, 1), h[0], noise)
            for g, h in zip(gradients, plain, strict=True)
        )

    # --- the examples of the rows -------------------------------------------------------

    @cached_property
    def _few(self) -> "Tape":
        """The tape of the first examples, if its graph is the same; else this one."""
        return self._resized(FEW) if self.num_examples > FEW else self

    def _resized(self, count: int) -> "Tape":
        """The tape of so many examples, if its graph is the same; else this one.

        If the batch has fewer, they are repeated.
        """
        places = torch.arange(count) % self.num_examples
        arguments = self.arguments[places]
        with torch.enable_grad():
            outputs = arguments(self.model)
        if outputs.shape != (count, *self.outputs.shape[1:]):
            return self
        tape = Tape(self.model, self.parameters, arguments, outputs, self.known)
        same = alike(tape.structure, self.structure, count, self.num_examples)
        return tape if same else self

    def _rows(self, scores: Tensor) -> list[Rows | None]:
        """The rows of every operation; probed if this structure of the graph is new."""
        if self.num_examples == 1:
            return [BATCH_FIRST] * len(self.operations)
        if not self.lasting:
            return self.probed(scores)[0]
        if self.signature in self.known.rows:
            return self.known.rows[self.signature]
        rows = self.known.rows.get(self._kind)
        if rows is None:
            rows, certain = self._few.probed(scores)
            # As many positions as examples, plus one, look the same in two orders.
            if not certain and (more := self._resized(FEW + 1)) is not self:
                of_more, certain = more.probed(scores)
                rows = of_more if certain else rows
            if certain:
                self.known.rows[self._kind] = rows
            elif self._few is not self:
                rows, certain = self.probed(scores)
            if not certain:
                return rows
        self.known.rows[self.signature] = rows
        return rows

    def probed(self, scores: Tensor) -> tuple[list[Rows | None], bool]:
        """The rows of every operation, and whether other batches have the same.

        They do if the gradients of this batch allow no other layout.
        """
        if not self.operations:
            return [], True
        n = self.num_examples
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(scores.shape[0], n, generator=generator).to(scores)
        places = torch.arange(n) % scores.shape[1]  # more examples than there are are repeated
        score = torch.einsum("kn,kn...->n...", weights, scores[:, places]).reshape(n, -1)
        # Every example has a score of norm 1, so none is lost in the rounding of another.
        # First by the largest entry, as the squares of small entries would be 0.
        tiny = torch.finfo(score.dtype).tiny
        score = score / score.abs().amax(1, keepdim=True).clamp_min(tiny)
        score = torch.nn.functional.normalize(score, eps=tiny)
        plain = self._rows_of(score)
        if self.known.noise is None:
            again = self._rows_of(score)
            self.known.noise = max(map(row_noise, plain, again))
        layouts = [possible_rows(len(gradient), n) for gradient in plain]
        # Every example has a different number, and is scaled by the digits of that number in
        # turn.  The noise must stay below the rows of the smallest factor.
        exact = self.known.noise < NEARLY_EXACT and score.dtype.itemsize > 2
        base = MANY_FACTORS if exact else FEW_FACTORS
        numbers = torch.randperm(n, generator=generator)
        while True:
            factors = 2.0 ** (numbers % base).to(score)
            scaled = self._rows_of(factors[:, None] * score)
            for place, (before, after) in enumerate(zip(plain, scaled, strict=True)):
                layouts[place] = matching_rows(
                    layouts[place], before, after, factors, self.known.noise
                )
            numbers = numbers // base
            if not numbers.any():
                break
        certain = all(len(rows) < 2 for rows in layouts) and all(g.any() for g in plain)
        return [rows[0] if rows else None for rows in layouts], certain

    def _rows_of(self, score: Tensor) -> list[Tensor]:
        """The rows of all operations' gradients for one score vector per example, flat."""
        score = score.view(1, *self.outputs.shape)
        gradients = one_by_one(self.outputs, self.edges, score, retain_graph=True)
        pairs = zip(self.operations, gradients, strict=True)
        return [operation.rows_of(gradient)[0] for operation, gradient in pairs]


def operations_of(graph: Graph, uses: Uses) -> tuple[list[Operation], dict[str, str]]:
    """The operations that use parameters.

    Returns:
        The operations; and for each parameter with another use why that has no rule.
    """
    operations: list[Operation] = []
    reasons: dict[str, str] = {}
    # Products come first, because the bias added to a product becomes part of it.
    for node in sorted(uses, key=lambda node: type(node).__name__ not in MatrixProduct.kinds):
        views = uses.get(node)
        if views is None:
            continue
        rule, reason = RULES.get(type(node).__name__), ""
        if node._input_metadata[0].dtype.is_complex:
            reason = f"{kind_of(node)} has complex numbers"
        elif rule is None:
            reason = f"no rule for {kind_of(node)}"
        elif (operation := rule.of(node, uses, graph)) is None:
            reason = f"no rule for this use in {kind_of(node)}"
        else:
            operations.append(operation)
        if reason:
            reasons |= {view.name: reason for view in views.values()}
    return operations, reasons


def kind_of(node: Node) -> str:
    """The kind of a node as a message has it."""
    return re.sub(r"Backward\d*$", "", type(node).__name__)


def restricted(operations: Sequence[Operation], unknown: Container[str]) -> list[Operation]:
    """The operations without the parameters in ``unknown``."""
    for operation in operations:
        operation.drop(unknown)
    return [operation for operation in operations if operation.views]


def merged(pullbacks: Sequence[Pullback]) -> list[Pullback]:
    """The pullbacks, with those that share a parameter merged into one."""
    group_of: dict[str, list[Pullback]] = {}
    for pullback in pullbacks:
        found = {id(g): g for name in pullback.shapes if (g := group_of.get(name)) is not None}
        group, *further = [*found.values()] or [[]]
        for other in further:
            group += other
        group.append(pullback)
        for member in group if further else (pullback,):
            group_of |= dict.fromkeys(member.shapes, group)
    groups = {id(group): group for group in group_of.values()}
    return [group[0] if len(group) == 1 else _combined(group) for group in groups.values()]


def _combined(group: Sequence[Pullback]) -> Pullback:
    """One pullback in place of several that share parameters."""
    first = group[0]
    if isinstance(first, OuterProducts):
        key = (first.weight, first.bias, first.layout)
        same = [p for p in group if isinstance(p, OuterProducts)]
        if len(same) == len(group) and all((p.weight, p.bias, p.layout) == key for p in same):
            uses = [use for p in same for use in p.uses]
            return OuterProducts(*key, uses, first.memory)
    return Summed(group)
