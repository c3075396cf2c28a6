"""The autograd graph behind a network's outputs: where and how its parameters are used.

Every use of a parameter is an edge into a node of the graph, whatever Python code made it.
That covers modules called several times, shared weights, functional calls and recurrences.
Views of a parameter (transposes, casts, blocks of rows) are followed to the nodes that
compute with them.  So are tensors that the network computes from parameters alone, such as a
normalised weight.
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
from torch.autograd.graph import GradientEdge, Node

from ewc.parameters import Parameters


@dataclass(frozen=True)
class View:
    """The view of a parameter that a node uses.

    Attributes:
        name: the parameter's name, or that of a tensor derived from parameters.
        shape: its shape.
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
    def narrowed(self) -> torch.Size:
        """The shape with the rows of the view only; not transposed."""
        return torch.Size([self.count, *self.shape[1:]]) if self.shape else self.shape

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.narrowed.numel()

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


@dataclass(frozen=True)
class Derived:
    """A tensor that the network computes from parameters, without examples.

    Attributes:
        edge: the tensor's place in the graph.
        parameters: the names of the parameters.
    """

    edge: GradientEdge
    parameters: tuple[str, ...]

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        return torch.Size(self.edge.node._input_metadata[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's type."""
        dtype: torch.dtype = self.edge.node._input_metadata[0].dtype
        return dtype


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
        self.deriving: set[Node] = set()
        """The nodes that compute with parameters alone, as far as :meth:`uses` found them."""
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
            if _moves_sometimes(type(node)) and node not in self.deriving
        )

    def uses(
        self, parameters: Parameters, num_examples: int, constants: Container[int]
    ) -> tuple[Uses, dict[str, Derived]]:
        """The nodes that compute with parameters and activations.

        Args:
            parameters: the parameters by name.
            num_examples: the number of examples in the batch.
            constants: the addresses of tensors that are the same in every batch.

        Returns:
            For each node, the view at each of its inputs; and the tensors that are derived from
            parameters, by the names that the views have for them.
        """
        uses: Uses = defaultdict(dict)
        derived: dict[str, Derived] = {}
        for name, parameter in parameters.items():
            if id(parameter) in self.leaves:
                self._follow(self.leaves[id(parameter)], whole_view(name, parameter.shape), uses)
        waiting = True
        while waiting:
            waiting = False
            for node, views in list(uses.items()):
                if not self._derives(node, views, num_examples, constants):
                    continue
                waiting = True
                self.deriving.add(node)
                del uses[node]
                names: dict[str, None] = {}
                for view in views.values():
                    behind = derived.get(view.name)
                    names |= dict.fromkeys(behind.parameters if behind else [view.name])
                name = f"derived tensor {len(derived)}"
                derived[name] = Derived(GradientEdge(node, 0), tuple(names))
                self._follow(node, whole_view(name, derived[name].shape), uses)
        return uses, derived

    def _follow(self, node: Node, view: View, uses: Uses) -> None:
        """Add the uses of a tensor, through the views that are made of it."""
        stack = [(node, view)]
        while stack:
            node, view = stack.pop()
            for consumer, place, number in self.consumers[node]:
                result = _result_view(node, number, view)
                further = _passed_on(consumer, result)
                if further is not None and self.consumers.get(consumer):
                    stack.append((consumer, further))
                else:
                    uses[consumer][place] = result

    def _derives(
        self, node: Node, views: Mapping[int, View], num_examples: int, constants: Container[int]
    ) -> bool:
        """Whether a node computes with parameters alone, and its result has no examples.

        It is a choice of the fast way only.  Whatever the result depends on, its gradient for
        one example can be pulled back to the parameters.
        """
        consumers = self.consumers.get(node, [])
        inputs = [source for source, _ in node.next_functions]
        if (
            not consumers
            or any(number for *_, number in consumers)
            or node._input_metadata[0].dtype.is_complex
            or any(source is not None and place not in views for place, source in enumerate(inputs))
        ):
            return False
        kind = type(node).__name__
        if kind in LOOKUPS:
            alone = num_examples == 1 and kind != "EmbeddingBackward0"
            return alone or self._repeated(node, num_examples)
        if _tiles(node):
            return True
        if inputs.count(None) == 1 and kind in PRODUCTS:
            return _by_constant(node, inputs.index(None), constants)
        if None in inputs or kind in REPEATING:
            size = max(view.size for view in views.values())
            entrywise = kind in ENTRYWISE or kind in REPEATING
            return entrywise and not _repeats(node, size, num_examples)
        return True

    def _repeated(self, node: Node, num_examples: int) -> bool:
        """Whether a result is the same for all examples: it is repeated for them later."""
        if getattr(node, "_saved_scale_grad_by_freq", False):
            return False
        size = prod(node._input_metadata[0].shape)
        stack = [node]
        repeated = False
        while stack:
            for consumer, _, _ in self.consumers.get(stack.pop(), []):
                kind = type(consumer).__name__
                if kind in RESHAPING:
                    stack.append(consumer)
                elif kind in ENTRYWISE or kind in REPEATING:
                    if num_examples == 1 or not _repeats(consumer, size, num_examples):
                        return False
                    repeated = True
                else:
                    return False
        return repeated

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


ENTRYWISE = {f"{kind}Backward0" for kind in ("Add", "Sub", "Mul", "Div", "Rsub")}
"""Nodes that compute entry by entry with two tensors, and repeat the smaller one."""

REPEATING = {"ExpandBackward0", "RepeatBackward0"}
"""Nodes that repeat one tensor."""

LOOKUPS = {"EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0"}
"""Nodes that look up rows, which may be those of all examples or the same for each."""

RESHAPING = {
    f"{kind}Backward0"
    for kind in ("View", "UnsafeView", "Unsqueeze", "Squeeze", "Permute", "Transpose", "T")
} | {"ToCopyBackward0", "CloneBackward0", "SqueezeBackward1"}
"""Nodes that keep all entries."""


def whole_view(name: str, shape: torch.Size) -> View:
    """The view of a tensor that is the tensor itself."""
    return View(name, shape, transposed=False, first=0, count=shape[0] if shape else 1)


def _by_constant(node: Node, place: int, constants: Container[int]) -> bool:
    """Whether a product's factor at this place is the same in every batch."""
    names = PRODUCTS[type(node).__name__]
    place -= len(node.next_functions) - len(names)  # a bias comes first
    if place < 0:
        return False
    factor: Tensor = getattr(node, f"_saved_{names[place]}")
    return place_in_memory(factor) in constants


def _tiles(node: Any) -> bool:
    """Whether a node repeats a dimension that has more than one entry."""
    if type(node).__name__ != "RepeatBackward0":
        return False
    sizes = node._saved_self_sym_sizes
    pairs = zip(node._saved_repeats[-len(sizes) :], sizes, strict=True) if sizes else ()
    return any(times > 1 and size > 1 for times, size in pairs)


def _repeats(node: Node, size: int, num_examples: int) -> bool:
    """Whether a node's result may have its input of this size once for every example."""
    return size > 0 and prod(node._input_metadata[0].shape) % (num_examples * size) == 0


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
    kind = type(node).__name__
    if kind in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
        turned = len(view.shape) == 2
        return replace(view, transposed=view.transposed != _exchanges(node)) if turned else None
    if kind in ("SplitBackward0", "SplitWithSizesBackward0") and view.whole:
        return view if getattr(node, "_saved_dim", None) == 0 else None
    if kind == "SliceBackward0" and view.whole and view.shape:
        return _slice_of(node, view)
    return view if kind == "ToCopyBackward0" else None


def _exchanges(node: Any) -> bool:
    """Whether a transpose or a permutation exchanges the two dimensions of a matrix."""
    if type(node).__name__ == "TransposeBackward0":
        return bool(node._saved_dim0 % 2 != node._saved_dim1 % 2)  # -1 is saved as 2^64 - 1
    return type(node).__name__ == "TBackward0" or node._saved_dims[0] % 2 != 0


def _slice_of(node: Any, view: View) -> View | None:
    """The rows that a slice has; ``None`` if it is one of another dimension."""
    if node._saved_dim % 2**64 != 0 or node._saved_step != 1:
        return None
    bounds = [
        bound - 2**64 if bound >= 2**63 else bound for bound in (node._saved_start, node._saved_end)
    ]
    first, last, _ = slice(*bounds).indices(view.shape[0])
    return replace(view, first=first, count=max(0, last - first))


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
