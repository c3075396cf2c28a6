"""Rules for the operations that use the parameters of a network.

A rule belongs to one kind of node of the autograd graph.  It computes the pulled-back
vectors of the node's parameters from what the node saved and the gradient with respect to
its result.  It applies to the operation itself, so it holds for modules, subclasses,
functional calls and the steps of a recurrence.  Operations without a rule go to
:mod:`ewc.pullback.per_example`.

The leading dimensions of a node's result are its *rows*.  Each row must belong to one
example, which :class:`~ewc.pullback.rows.Rows` gives and :mod:`ewc.pullback.tape` determines.
"""

from abc import ABC, abstractmethod
from collections.abc import Container
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ewc.pullback.graph import Graph, Uses, View
from ewc.pullback.pullback import Pullback
from ewc.pullback.rows import Rows


class Operation(ABC):
    """One use of parameters: a node of the graph and what the rule needs from it.

    Attributes:
        kinds: the types of nodes that the rule covers.
        label: the rule's name for the user.
        output: the node.
        weight: one parameter among its inputs.
        bias: a second parameter among its inputs.
        row_dims: the number of leading dimensions of the result that are rows.
    """

    kinds: ClassVar[tuple[str, ...]]
    label: ClassVar[str]
    output: Node
    weight: View | None = None
    bias: View | None = None
    row_dims: int = 1

    @classmethod
    @abstractmethod
    def of(cls, node: Any, uses: Uses, graph: Graph) -> Self | None:
        """The operation at ``node``; ``None`` if the rule does not hold there.

        Args:
            node: a node of one of the :attr:`kinds`.
            uses: the parameters among the inputs of nodes.  If the operation includes another
                node, that node is removed here.
            graph: the graph.
        """

    @abstractmethod
    def pullbacks(
        self, gradient: Tensor, rows: Rows, num_examples: int, memory: int
    ) -> list[Pullback]:
        """The vectors of the parameters.

        Args:
            gradient: with respect to the result, ``[k, rows, ...]``.
            rows: the layout of the rows.
            num_examples: ``n``.
            memory: bytes that intermediate results may take.
        """

    @property
    def views(self) -> list[View]:
        """The views of the parameters that the operation uses."""
        return [view for view in (self.weight, self.bias) if view is not None]

    def drop(self, names: Container[str]) -> None:
        """Drop the parameters that are among ``names``."""
        if self.weight is not None and self.weight.name in names:
            self.weight = None
        if self.bias is not None and self.bias.name in names:
            self.bias = None

    def positions(self, num_examples: int) -> int:
        """The number of positions per example at which the parameters are used."""
        shape: torch.Size = self.output._input_metadata[0].shape
        return prod(shape[: self.row_dims]) // num_examples

    def rows_of(self, gradient: Tensor) -> Tensor:
        """A gradient ``[k, *rows, ...]`` as ``[k, rows, ...]``."""
        return gradient.flatten(1, self.row_dims) if self.row_dims > 1 else gradient
