"""The autograd graph behind a network's outputs: where and how its parameters are used.

Every use of a parameter is an edge into some node of the graph, whatever Python code made
it: a module called once or ten times, a weight shared between modules, a functional call,
the steps of a recurrence.  Views of a parameter (transposes, casts, blocks of rows) are
followed to the nodes that compute with them.
"""

import re
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ewc.parameters import Parameters


@dataclass(frozen=True)
class View:
    """How a parameter is seen by the node that uses it.

    Attributes:
        name: the parameter.
        shape: its own shape.
        transposed: a matrix with its two dimensions exchanged.
        first: the first of its rows that are seen.
        count: how many of them.
    """

    name: str
    shape: torch.Size
    transposed: bool
    first: int
    count: int

    @property
    def whole(self) -> bool:
        """Whether the parameter is seen as it is."""
        return not self.transposed and self.all_rows

    @property
    def all_rows(self) -> bool:
        """Whether all rows are seen."""
        return self.count == (self.shape[0] if self.shape else 1)

    def widened(self, gradient: Tensor, dim: int) -> Tensor:
        """A gradient for the rows that are seen as one for all rows: zero elsewhere."""
        if self.all_rows:
            return gradient
        shape = list(gradient.shape)
        shape[dim] = self.shape[0]
        wide = gradient.new_zeros(shape)
        wide.narrow(dim, self.first, self.count).copy_(gradient)
        return wide


Uses = dict[Node, dict[int, View]]
"""The nodes that compute with parameters: of each, which of its inputs is which view."""


GraphStructure = tuple[
    tuple[str, tuple[Any, ...], tuple[tuple[int, int], ...], tuple[int, ...]], ...
]
"""See :meth:`Graph.structure`."""

MOVES_ROWS = re.compile(
    "^(Index|Gather|Scatter|Take|Masked(Select|Scatter)|Sort|Topk|Cpp|_?Pack|EmbeddingBag"
    "|Segment|CopySlices|.*Nested)|Sparse|Backward$"
)
"""Nodes that may put rows elsewhere for every batch; one's own functions end so, unnumbered."""


class Graph:
    """The autograd graph behind a tensor.

    Args:
        outputs: the tensor.

    Raises:
        ValueError: a reentrant checkpoint hides a part of the graph.
    """

    def __init__(self, outputs: Tensor) -> None:
        self.consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
        """The nodes that take a node's results: the node, its input, the result's number."""
        self.leaves: dict[int, Node] = {}
        self.nodes: dict[Node, int] = {}
        """All nodes but the leaves, numbered in an order that follows from the graph."""
        self.inputs: list[tuple[tuple[Node | None, int], ...]] = []
        """Of every node the nodes that its inputs come from, and which of their results."""
        root = outputs.grad_fn
        stack = [root] if root is not None else []
        seen: set[Node] = set(stack)
        while stack:
            node = stack.pop()
            self.nodes[node] = len(self.nodes)
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise ValueError(
                    "A reentrant checkpoint hides the parameters inside from the autograd "
                    "graph: use torch.utils.checkpoint with use_reentrant=False."
                )
            self.inputs.append(node.next_functions)
            for place, (source, number) in enumerate(self.inputs[-1]):
                if source is None:
                    continue
                self.consumers[source].append((node, place, number))
                if type(source).__name__ == "AccumulateGrad":
                    self.leaves[id(source.variable)] = source  # type: ignore[attr-defined]
                elif source not in seen:
                    seen.add(source)
                    stack.append(source)

    def structure(self) -> GraphStructure:
        """All that the graph shows but the values of tensors.

        Of every node its kind, the numbers it saved (sizes, dimensions, indices, shifts),
        where its inputs come from, and the sizes of dimensions that it cuts.
        """
        number_of = self.nodes.get
        entries = []
        for node, sources in zip(self.nodes, self.inputs, strict=True):
            kind = type(node)
            # Sizes, dimensions, indices and the like; no tensor is read.
            numbers = tuple([getattr(node, name) for name in _numbers_of(kind)])
            origins = tuple([(number_of(source, -1), place) for source, place in sources])  # type: ignore[arg-type]
            cut = _cut_sizes(node) if _cuts(kind) else ()
            entries.append((kind.__name__, numbers, origins, cut))
        return tuple(entries)

    def bytes_of_results(self) -> int:
        """What the results of all nodes take."""
        results = [meta for node in self.nodes for meta in node._input_metadata]
        return sum(prod(meta.shape) * meta.dtype.itemsize for meta in results)

    def moves_rows(self, uses: Uses, num_examples: int, constants: Container[int]) -> bool:
        """Whether a node may put rows elsewhere for every batch, by the values of a tensor.

        An index, a mask, a permutation as a matrix: what its graph looks like does not tell.

        Args:
            uses: the parameters among the inputs of nodes.
            num_examples: those of the batch.
            constants: the places in memory of tensors that are the same in every batch.
        """
        turned = any(type(node).__name__.startswith(("Flip", "Roll")) for node in self.nodes)
        return any(
            _may_move_rows(node, uses.get(node, {}), num_examples, constants, turned)
            for node in self.nodes
            if _moves_sometimes(type(node))
        )

    def uses(self, parameters: Parameters) -> Uses:
        """The nodes that compute with parameters: of each, which input is which view."""
        found: dict[Node, dict[int, View]] = defaultdict(dict)
        for name, parameter in parameters.items():
            leaf = self.leaves.get(id(parameter))
            if leaf is None:
                continue
            rows = parameter.shape[0] if parameter.dim() else 1
            stack = [(leaf, View(name, parameter.shape, False, 0, rows))]
            while stack:
                node, view = stack.pop()
                for consumer, place, number in self.consumers[node]:
                    part = _part(node, number, view)
                    further = _seen_through(consumer, part)
                    if further is not None and self.consumers.get(consumer):
                        stack.append((consumer, further))
                    else:
                        found[consumer][place] = part
        return found

    def counts_words(self) -> bool:
        """Whether an embedding's gradient is divided by how often a batch uses a word.

        The gradient of a batch is then not the sum of those that its examples have alone.
        """
        return any(getattr(node, "_saved_scale_grad_by_freq", False) for node in self.nodes)

    def only_consumer(self, node: Node) -> tuple[Node, int] | None:
        """The one node that takes the result of ``node``, behind mere reshaping."""
        while True:
            consumers = self.consumers.get(node, [])
            if len(consumers) != 1:
                return None
            ((following, place, _),) = consumers
            if type(following).__name__ not in ("ViewBackward0", "UnsafeViewBackward0"):
                return following, place
            node = following


def alike(one: GraphStructure, other: GraphStructure, n: int, m: int) -> bool:
    """Whether two structures are one, but for numbers that are proportional to the examples.

    A dimension that is cut must be the same: a shift by four rows leaves four as they are.

    Args:
        one: the structure of a graph for ``n`` examples.
        other: that of a graph for ``m``.
        n: examples.
        m: examples.
    """

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        if type(a) is int and type(b) is int:
            return a == b or a * m == b * n
        return bool(a == b)

    return len(one) == len(other) and all(
        (a[0], *a[2:]) == (b[0], *b[2:]) and same(a[1], b[1])
        for a, b in zip(one, other, strict=True)
    )


@cache
def _numbers_of(kind: type[Node]) -> tuple[str, ...]:
    """The names of what nodes of a kind save that are no tensors."""
    return tuple(
        name
        for name in dir(kind)
        # Tensors have a raw form beside them.
        if name.startswith("_saved_") and not hasattr(kind, f"_raw{name}")
    )


CUTS = re.compile("^(Slice|Select|Split|Roll|AsStrided|Unfold|Diagonal)")
"""Nodes that take parts of a dimension, or move them."""


@cache
def _cuts(kind: type[Node]) -> bool:
    return CUTS.match(kind.__name__) is not None


def _cut_sizes(node: Node) -> tuple[int, ...]:
    """The sizes of the dimensions that a node cuts."""
    shape = getattr(node, "_saved_self_sym_sizes", None)
    if shape is None:
        shape = tuple(node._input_metadata[0].shape)
    dims: tuple[int, ...] = getattr(node, "_saved_dims", ())
    if hasattr(node, "_saved_dim"):
        dims = (node._saved_dim,)
    # Counted from the end, a dimension is saved as 2^64 less.
    return tuple(shape[d - 2**64 if d >= 2**63 else d] for d in dims) or tuple(shape)


PRODUCTS = {
    "MmBackward0": ("self", "mat2"),
    "AddmmBackward0": ("mat1", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
}
"""Matrix products, and the names by which they save their factors."""


@cache
def _moves_sometimes(kind: type[Node]) -> bool:
    name = kind.__name__
    return bool(MOVES_ROWS.search(name)) or name in PRODUCTS or name.startswith(("Where", "Mul"))


def _may_move_rows(
    node: Node, views: Mapping[int, View], n: int, constants: Container[int], turned: bool
) -> bool:
    kind = type(node).__name__
    if MOVES_ROWS.search(kind):
        return True
    absent = [source is None for source, _ in node.next_functions][-2:]
    if kind.startswith("Where"):
        return not any(absent)
    if sum(absent) != 1 or views:
        return False
    place = absent.index(True)
    return _mixes(node, place, n, constants) if kind in PRODUCTS else _masks(node, place, n, turned)


def _masks(node: Node, place: int, n: int, turned: bool) -> bool:
    """Whether a factor may choose between rows and turned rows, or between pairs of rows."""
    mask: Tensor | None = getattr(node, f"_saved_{('self', 'other')[place]}")
    if mask is None or mask.numel() == 1:
        return False
    pairs = [size for size in node._input_metadata[0].shape if size and size % n == 0]
    return turned or len(pairs) > 1


def _mixes(node: Node, place: int, n: int, constants: Container[int]) -> bool:
    """Whether a matrix mixes as many things as there are rows, and is not the network's own."""
    matrix: Tensor = getattr(node, f"_saved_{PRODUCTS[type(node).__name__][place]}")
    if place_in_memory(matrix) in constants:
        return False
    return matrix.shape[(-1, -2)[place]] % n == 0


def place_in_memory(tensor: Tensor) -> int:
    """Where a tensor's entries are; 0 for one that has none of its own, as in ``torch.func``."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _seen_through(node: Node, view: View) -> View | None:
    """The view behind a node that only shows its input otherwise; ``None`` if it computes."""
    kind, matrix = type(node).__name__, len(view.shape) == 2
    if kind == "TBackward0" and matrix:
        return replace(view, transposed=not view.transposed)
    if kind == "TransposeBackward0" and matrix:
        saved: Mapping[str, int] = {d: getattr(node, f"_saved_{d}") for d in ("dim0", "dim1")}
        swapped = saved["dim0"] % 2 != saved["dim1"] % 2  # -1 is saved as 2^64 - 1
        return replace(view, transposed=view.transposed != swapped)
    if kind == "PermuteBackward0" and matrix:
        exchanged = node._saved_dims[0] != 0  # type: ignore[attr-defined]
        return replace(view, transposed=view.transposed != exchanged)
    if kind == "ToCopyBackward0":
        return view
    if kind in ("SplitBackward0", "SplitWithSizesBackward0") and view.whole:
        return view if getattr(node, "_saved_dim", None) == 0 else None
    return None


def _part(node: Node, number: int, view: View) -> View:
    """The rows of which a node's result with this number consists."""
    kind = type(node).__name__
    if kind == "SplitBackward0":
        size: int = node._saved_split_size  # type: ignore[attr-defined]
        first = number * size
        return replace(view, first=first, count=min(size, view.shape[0] - first))
    if kind == "SplitWithSizesBackward0":
        sizes: tuple[int, ...] = node._saved_split_sizes  # type: ignore[attr-defined]
        return replace(view, first=sum(sizes[:number]), count=sizes[number])
    return view
