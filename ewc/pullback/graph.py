"""The autograd graph behind a network's outputs: where and how its parameters are used.

Every use of a parameter is an edge into a node of the graph, whatever Python code made it.
That covers modules called several times, shared weights, functional calls and recurrences.
Views of a parameter (transposes, casts, blocks of rows) are followed to the nodes that
compute with them.
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
    """The view of a parameter that a node uses.

    Attributes:
        name: the parameter's name.
        shape: the parameter's shape.
        transposed: whether the two dimensions of a matrix are exchanged.
        first: the first of the parameter's rows in the view.
        count: the number of rows in the view.
    """

    name: str
    shape: torch.Size
    transposed: bool
    first: int
    count: int

    @property
    def whole(self) -> bool:
        """Whether the view is the unchanged parameter."""
        return not self.transposed and self.all_rows

    @property
    def all_rows(self) -> bool:
        """Whether the view has all rows."""
        return self.count == (self.shape[0] if self.shape else 1)

    def widened(self, gradient: Tensor, dim: int) -> Tensor:
        """A gradient of the view as one of all rows, zero in the rows outside the view."""
        if self.all_rows:
            return gradient
        shape = list(gradient.shape)
        shape[dim] = self.shape[0]
        wide = gradient.new_zeros(shape)
        wide.narrow(dim, self.first, self.count).copy_(gradient)
        return wide


Uses = dict[Node, dict[int, View]]
"""The nodes that compute with parameters; for each node, the view at each of its inputs."""


GraphStructure = tuple[
    tuple[str, tuple[Any, ...], tuple[tuple[int, int], ...], tuple[int, ...]], ...
]
"""See :meth:`Graph.structure`."""

MOVES_ROWS = re.compile(
    "^(Index|Gather|Scatter|Take|Masked(Select|Scatter)|Sort|Topk|Cpp|_?Pack|EmbeddingBag"
    "|Segment|CopySlices|.*Nested)|Sparse|Backward$"
)
"""Nodes that may order the rows differently in every batch.

The names of custom functions end in ``Backward`` without a number.
"""


class Graph:
    """The autograd graph behind a tensor.

    Args:
        outputs: the tensor.

    Raises:
        ValueError: the graph has a reentrant checkpoint.
    """

    def __init__(self, outputs: Tensor) -> None:
        self.consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
        """The nodes that use a node's results: the node, its input, the result's number."""
        self.leaves: dict[int, Node] = {}
        self.nodes: dict[Node, int] = {}
        """All nodes except the leaves, numbered in an order that the graph determines."""
        self.inputs: list[tuple[tuple[Node | None, int], ...]] = []
        """For every node, the nodes that its inputs come from, and the number of the result."""
        root = outputs.grad_fn
        stack = [root] if root is not None else []
        seen: set[Node] = set(stack)
        while stack:
            node = stack.pop()
            self.nodes[node] = len(self.nodes)
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise ValueError(
                    "The network has a reentrant checkpoint, whose parameters are not in the "
                    "autograd graph: use torch.utils.checkpoint with use_reentrant=False."
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
        """The graph without the values of tensors.

        For every node: its kind, the numbers it saved (sizes, dimensions, indices, shifts),
        the origins of its inputs, and the sizes of the dimensions that it cuts.
        """
        number_of = self.nodes.get
        entries = []
        for node, sources in zip(self.nodes, self.inputs, strict=True):
            kind = type(node)
            # Sizes, dimensions, indices and the like, but no tensor.
            numbers = tuple([getattr(node, name) for name in _numbers_of(kind)])
            origins = tuple([(number_of(source, -1), place) for source, place in sources])  # type: ignore[arg-type]
            cut = _cut_sizes(node) if _cuts(kind) else ()
            entries.append((kind.__name__, numbers, origins, cut))
        return tuple(entries)

    def bytes_of_results(self) -> int:
        """The bytes of the results of all nodes."""
        results = [meta for node in self.nodes for meta in node._input_metadata]
        return sum(prod(meta.shape) * meta.dtype.itemsize for meta in results)

    def moves_rows(self, uses: Uses, num_examples: int, constants: Container[int]) -> bool:
        """Whether the values of a tensor may decide the order of the rows.

        Such a tensor is an index, a mask, or a permutation matrix.  Two batches may then have
        different orders and the same graph.

        Args:
            uses: the parameters among the inputs of nodes.
            num_examples: the number of examples in the batch.
            constants: the addresses of tensors that are the same in every batch.
        """
        turned = any(type(node).__name__.startswith(("Flip", "Roll")) for node in self.nodes)
        return any(
            _may_move_rows(node, uses.get(node, {}), num_examples, constants, turned)
            for node in self.nodes
            if _moves_sometimes(type(node))
        )

    def uses(self, parameters: Parameters) -> Uses:
        """The nodes that compute with parameters; for each node, the view at each input."""
        uses: dict[Node, dict[int, View]] = defaultdict(dict)
        for name, parameter in parameters.items():
            leaf = self.leaves.get(id(parameter))
            if leaf is None:
                continue
            rows = parameter.shape[0] if parameter.dim() else 1
            stack = [(leaf, View(name, parameter.shape, False, 0, rows))]
            while stack:
                node, view = stack.pop()
                for consumer, place, number in self.consumers[node]:
                    result = _result_view(node, number, view)
                    further = _passed_on(consumer, result)
                    if further is not None and self.consumers.get(consumer):
                        stack.append((consumer, further))
                    else:
                        uses[consumer][place] = result
        return uses

    def counts_words(self) -> bool:
        """Whether an embedding's gradient is divided by the count of a word in the batch.

        The gradient of a batch is then not the sum of the gradients of its examples.
        """
        return any(getattr(node, "_saved_scale_grad_by_freq", False) for node in self.nodes)

    def only_consumer(self, node: Node) -> tuple[Node, int] | None:
        """The only node that uses the result of ``node``, apart from reshaping."""
        while True:
            consumers = self.consumers.get(node, [])
            if len(consumers) != 1:
                return None
            ((following, place, _),) = consumers
            if type(following).__name__ not in ("ViewBackward0", "UnsafeViewBackward0"):
                return following, place
            node = following


def alike(one: GraphStructure, other: GraphStructure, n: int, m: int) -> bool:
    """Whether two structures are equal up to numbers proportional to the number of examples.

    The sizes of dimensions that are cut must be equal: a shift by four rows does nothing to
    four rows.

    Args:
        one: the structure of a graph for ``n`` examples.
        other: the structure of a graph for ``m`` examples.
        n: the examples of ``one``.
        m: the examples of ``other``.
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
    """The names of what nodes of a kind save, without tensors."""
    return tuple(
        name
        for name in dir(kind)
        # Only tensors have a raw form too.
        if name.startswith("_saved_") and not hasattr(kind, f"_raw{name}")
    )


CUTS = re.compile("^(Slice|Select|Split|Roll|AsStrided|Unfold|Diagonal)")
"""Nodes that cut a dimension, or move pieces of it."""


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
    """Whether a factor may select rows out of reordered rows, or pairs of rows."""
    mask: Tensor | None = getattr(node, f"_saved_{('self', 'other')[place]}")
    if mask is None or mask.numel() == 1:
        return False
    pairs = [size for size in node._input_metadata[0].shape if size and size % n == 0]
    return turned or len(pairs) > 1


def _mixes(node: Node, place: int, n: int, constants: Container[int]) -> bool:
    """Whether a matrix that is not a constant of the network may mix the rows."""
    matrix: Tensor = getattr(node, f"_saved_{PRODUCTS[type(node).__name__][place]}")
    if place_in_memory(matrix) in constants:
        return False
    return matrix.shape[(-1, -2)[place]] % n == 0


def place_in_memory(tensor: Tensor) -> int:
    """The address of a tensor's entries; 0 if it has no storage, as in ``torch.func``."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _passed_on(node: Node, view: View) -> View | None:
    """The view that a node makes of its input; ``None`` if the node computes with it."""
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


def _result_view(node: Node, number: int, view: View) -> View:
    """The rows that one result of a node has; the results are numbered."""
    kind = type(node).__name__
    if kind == "SplitBackward0":
        size: int = node._saved_split_size  # type: ignore[attr-defined]
        first = number * size
        return replace(view, first=first, count=min(size, view.shape[0] - first))
    if kind == "SplitWithSizesBackward0":
        sizes: tuple[int, ...] = node._saved_split_sizes  # type: ignore[attr-defined]
        return replace(view, first=sum(sizes[:number]), count=sizes[number])
    return view
