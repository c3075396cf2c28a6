r"""Rules for the operations that networks apply their parameters in.

A rule belongs to one kind of node of the autograd graph and says, from what the node
saved and the gradient ``g`` with respect to its result, what the pulled-back vectors of
its parameters are.  It sees the operation itself, so it holds for a module, a subclass, a
functional call and the steps of a recurrence alike; whatever has no rule goes to
:mod:`ewc.fisher.per_example`.

The leading dimensions of a node's result are its *rows*.  Each must belong to one example;
:class:`Rows` says which (:mod:`ewc.fisher.tape` finds it out).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

from ewc.fisher.graph import Graph, Uses, View
from ewc.fisher.outer import Factors, OuterProducts, TensorFactors, WeightLayout
from ewc.fisher.pullback import Pullback, Stored


@dataclass(frozen=True)
class Rows:
    """Which example a row belongs to: rows are ``[outer, n, inner]``, in this order.

    Attributes:
        outer: the positions before the example; ``None`` if the other number tells.
        inner: the positions behind it; ``None`` if the other number tells.
    """

    outer: int | None
    inner: int | None

    def by_example(self, tensor: Tensor, num_examples: int, dim: int = 0) -> Tensor:
        """Dimension ``dim``, the rows, as two dimensions ``[n, t]``."""
        length = tensor.shape[dim] // num_examples
        outer = length // self.inner if self.outer is None else self.outer  # type: ignore[operator]
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        split = tensor.reshape(*before, outer, num_examples, length // outer, *after)
        return split.transpose(dim, dim + 1).flatten(dim + 1, dim + 2)

    def fit(self, rows: int, num_examples: int) -> bool:
        """Whether so many rows can be laid out in this way."""
        fixed = (self.outer or 1) * (self.inner or 1)
        whole = rows % (num_examples * fixed) == 0
        return whole and (None in (self.outer, self.inner) or rows == num_examples * fixed)


class Operation(ABC):
    """One use of parameters: a node of the graph, and what is needed from it.

    Attributes:
        kinds: the types of nodes that the rule knows.
        output: the node.
        weight: one parameter among its inputs.
        bias: another one.
        row_dims: how many leading dimensions of the result are rows.
    """

    kinds: ClassVar[tuple[str, ...]]
    output: Node
    weight: View | None = None
    bias: View | None = None
    row_dims: int = 1

    @classmethod
    @abstractmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The operation at ``node``, ``None`` if the rule does not hold there.

        Args:
            node: a node of one of the :attr:`kinds`.
            uses: the parameters among the inputs of nodes; what an operation takes in of
                other nodes it takes out there.
            graph: the graph.
        """

    @abstractmethod
    def pullback(self, gradient: Tensor, rows: Rows, num_examples: int, memory: int) -> Pullback:
        """The vectors of the parameters.

        Args:
            gradient: with respect to the result, ``[k, rows, ...]``.
            rows: which example a row belongs to.
            num_examples: ``n``.
            memory: bytes that intermediate results may take.
        """

    @property
    def views(self) -> list[View]:
        """The parameters that are used."""
        return [view for view in (self.weight, self.bias) if view is not None]

    def keep(self, names: set[str]) -> None:
        """Drop the parameters that are not among ``names``."""
        if self.weight is not None and self.weight.name not in names:
            self.weight = None
        if self.bias is not None and self.bias.name not in names:
            self.bias = None

    def rows_of(self, gradient: Tensor) -> Tensor:
        """A gradient ``[k, *rows, ...]`` as ``[k, rows, ...]``."""
        return gradient.flatten(1, self.row_dims) if self.row_dims > 1 else gradient


class MatrixProduct(Operation):
    """``a @ W.T + b`` and ``a @ W``: linear layers, projections of attention, recurrence."""

    kinds = ("AddmmBackward0", "MmBackward0")
    input: Tensor

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The product, with a bias that is added right behind it."""
        views = uses[node]
        product = cls()
        product.output = node
        added = type(node).__name__ == "AddmmBackward0"
        if added and (node._saved_alpha != 1 or node._saved_beta != 1):
            return None
        weight_place = 2 if added else 1
        if not views.keys() <= ({0, 2} if added else {1}):
            return None
        weight = product.weight = views.get(weight_place)
        bias = product.bias = views.get(0) if added else None
        if bias is not None and len(bias.shape) != 1:
            return None
        if weight is not None:
            if len(weight.shape) != 2 or not (weight.transposed or weight.all_rows):
                return None
            product.input = node._saved_mat1 if added else node._saved_self
            if not added:
                product.bias = _bias_added_to(node, weight, uses, graph)
        return product

    def pullback(self, gradient: Tensor, rows: Rows, num_examples: int, memory: int) -> Pullback:
        """Outer products of output gradients and inputs, position by position."""
        g = rows.by_example(gradient, num_examples, 1)
        if self.weight is None:
            assert self.bias is not None
            return Stored({self.bias.name: self.bias.widened(g.sum(2), 2)}, memory)
        if self.weight.transposed:
            g = self.weight.widened(g, 3)
        a = rows.by_example(self.input.to(g.dtype), num_examples)
        factors = TensorFactors(a[:, None], g[:, :, None])
        # Seen transposed, the parameter is [o, i], as in a linear layer.
        layout = WeightLayout(self.weight.shape, transposed=not self.weight.transposed)
        bias = self.bias.name if self.bias is not None else None
        return OuterProducts(self.weight.name, bias, layout, [factors], memory)


def _bias_added_to(node: Node, weight: View, uses: Uses, graph: Graph) -> View | None:
    """The bias that is added to a product and to nothing else; its use is taken out."""
    following, place = graph.only_consumer(node) or (None, 0)
    if following is None or type(following).__name__ != "AddBackward0":
        return None
    bias = uses.get(following, {}).get(1 - place)
    outputs = weight.count if weight.transposed else weight.shape[1]
    fits = bias is not None and len(bias.shape) == 1 and bias.count == outputs
    same = bias is not None and (bias.first == weight.first or not weight.transposed)
    if not (fits and same) or following._saved_alpha != 1:  # type: ignore[attr-defined]
        return None
    del uses[following]
    return bias


class Convolution(Operation):
    """Convolutions, transposed ones too, in any number of dimensions."""

    kinds = ("ConvolutionBackward0",)
    input: Tensor
    geometry: "Geometry"

    @classmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The convolution, if it uses its parameters as they are."""
        views = uses[node]
        if 0 in views or not all(view.whole for view in views.values()):
            return None
        convolution = cls()
        convolution.output, convolution.weight, convolution.bias = node, views.get(1), views.get(2)
        if convolution.weight is not None:
            convolution.input = node._saved_input
            convolution.geometry = Geometry(
                kernel=convolution.weight.shape[2:],
                stride=tuple(node._saved_stride),
                padding=tuple(node._saved_padding),
                dilation=tuple(node._saved_dilation),
                groups=node._saved_groups,
                transposed=node._saved_transposed,
            )
        return convolution

    def pullback(self, gradient: Tensor, rows: Rows, num_examples: int, memory: int) -> Pullback:
        """Outer products of output gradients and inputs under the kernel."""
        if self.weight is None:
            assert self.bias is not None
            summed = rows.by_example(gradient.flatten(3).sum(3), num_examples, 1).sum(2)
            return Stored({self.bias.name: summed}, memory)
        g = rows.by_example(gradient, num_examples, 1)
        a = rows.by_example(self.input.to(g.dtype), num_examples)
        shape = self.geometry
        layout = WeightLayout(self.weight.shape, shape.groups, shape.transposed)
        bias = self.bias.name if self.bias is not None else None
        factors = ConvolutionFactors(a, g, shape)
        return OuterProducts(self.weight.name, bias, layout, [factors], memory)


@dataclass(frozen=True)
class Geometry:
    """Where a kernel lies at every position of a convolution's result.

    Attributes:
        kernel: its sizes.
        stride: of the positions.
        padding: zeros at both ends.
        dilation: between the kernel's entries.
        groups: convolutions side by side.
        transposed: whether it is a transposed convolution.
    """

    kernel: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    def patches(self, x: Tensor, sizes: torch.Size) -> Tensor:
        """What the kernel sees: ``[n, c, *x]`` as ``[n, c, *kernel, *sizes]``, a view or copy.

        Args:
            x: the input.
            sizes: of the result.
        """
        pads: list[int] = []
        stride = self.stride
        if self.transposed:
            # A transposed convolution is a plain one, of stride 1 and with the kernel
            # turned round, over the input with zeros put between its entries.
            spread = [(length - 1) * s + 1 for length, s in zip(x.shape[2:], stride, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *spread)
            strided: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
            wide[strided] = x
            x, stride = wide, (1,) * len(stride)
            for axis in reversed(range(len(sizes))):
                reach = self.dilation[axis] * (self.kernel[axis] - 1)
                left = reach - self.padding[axis]
                pads += [left, sizes[axis] + reach - left - x.shape[2 + axis]]
        else:
            for axis in reversed(range(len(sizes))):
                pads += [self.padding[axis]] * 2
        x = functional.pad(x, pads) if any(pads) else x.contiguous()
        steps = x.stride()[2:]
        patches = x.as_strided(
            (*x.shape[:2], *self.kernel, *sizes),
            (
                *x.stride()[:2],
                *(s * d for s, d in zip(steps, self.dilation, strict=True)),
                *(s * d for s, d in zip(steps, stride, strict=True)),
            ),
            x.storage_offset(),
        )
        return patches.flip(tuple(range(2, 2 + len(sizes)))) if self.transposed else patches


@dataclass(frozen=True)
class ConvolutionFactors(Factors):
    """The factors of a convolution.

    Attributes:
        input: ``[n, t, c, *sizes]``, with ``t`` convolutions an example.
        gradient: ``[k, n, t, o, *sizes]``.
        geometry: where the kernel lies.
    """

    input: Tensor
    gradient: Tensor
    geometry: Geometry

    @property
    def positions(self) -> int:  # type: ignore[override]
        """The entries of a result's channel, times the convolutions an example."""
        return self.gradient.shape[2] * self.gradient.shape[4:].numel()

    @property
    def size(self) -> tuple[int, int, torch.dtype]:  # type: ignore[override]
        """``k``, ``n`` and the floating-point type."""
        return *self.gradient.shape[:2], self.gradient.dtype

    def inputs(self, examples: slice) -> Tensor:
        """The inputs under the kernel at every position, ``[n, g, t, i]``."""
        x = self.input[examples]
        n, t, channels = x.shape[:3]
        patches = self.geometry.patches(x.flatten(0, 1), self.gradient.shape[4:])
        size = channels // self.geometry.groups * self.geometry.kernel.numel()
        flat = patches.reshape(n, t, self.geometry.groups, size, -1)
        if t == 1:
            return flat[:, 0].transpose(-1, -2)
        return flat.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def input_rows(self, examples: slice) -> Tensor:
        """The inputs under the kernel of all examples and positions, ``[g, r, i]``."""
        # Columns one after the other: copied once, in the order of the product.
        x = self.input[examples].flatten(0, 1)
        patches = self.geometry.patches(x, self.gradient.shape[4:]).transpose(0, 1)
        size = x.shape[1] // self.geometry.groups * self.geometry.kernel.numel()
        last = patches.movedim(1, 1 + len(self.geometry.kernel))
        return last.reshape(self.geometry.groups, size, -1).transpose(1, 2)

    def gradient_rows(self, examples: slice) -> Tensor:
        """The output gradients of all vectors, examples and positions, ``[g, r, o]``."""
        g = self.gradient[:, examples].movedim(3, 0)
        groups = self.geometry.groups
        return g.reshape(groups, g.shape[0] // groups, -1).transpose(1, 2)

    def gradients(self, examples: slice) -> Tensor:
        """The output gradients, ``[k, n, g, t, o]``."""
        g = self.gradient[:, examples]
        k, n, t, channels = g.shape[:4]
        split = g.reshape(k, n, t, self.geometry.groups, channels // self.geometry.groups, -1)
        if t == 1:
            return split[:, :, 0].transpose(-1, -2)
        return split.permute(0, 1, 3, 2, 5, 4).flatten(3, 4)
