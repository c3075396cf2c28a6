r"""One forward pass, recorded: which layers were used, and how to pull scores back.

The tape hooks every layer that has a rule, keeps its input and the place of its output
in the autograd graph, and takes gradients with respect to those *outputs*, all score
vectors at once.  No gradient of a weight is ever formed by autograd.

A rule is trusted only where it is known to be right: the layer's first dimension must be
the example (seen from how the shapes follow the batch size), its rows must be the examples
in their order (seen from how gradients follow the scores, in the first batch of more than
one), and every use of its parameters in the graph must be a recorded call (seen by
counting).  All other parameters go to
:class:`~ewc.fisher.per_example.PerExamplePullback`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ewc.fisher.layers import RULES, Call, LayerPullback, Pullback
from ewc.fisher.per_example import PerExamplePullback, quiet_about_speed
from ewc.parameters import Parameters, accumulation_dtype


@dataclass(frozen=True)
class Layer:
    """A module with a rule.

    Attributes:
        module: the module.
        rule: its rule.
        names: full names of its trainable parameters, by their names in the module.
    """

    module: nn.Module
    rule: type[LayerPullback]
    names: dict[str, str]


@dataclass(frozen=True)
class Record:
    """One use of a layer: its input, and its output's place in the autograd graph."""

    input: Tensor
    version: int
    edge: GradientEdge
    output_size: int


def layers_with_rules(model: nn.Module, parameters: Parameters) -> list[Layer]:
    """The modules of ``model`` whose trainable parameters a rule may cover."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers = []
    for module in model.modules():
        rule = RULES.get(type(module))
        own = {local: p for local, p in module._parameters.items() if p is not None}
        if rule is None or "forward" in vars(module) or not own.keys() <= {"weight", "bias"}:
            continue
        trainable = {local: names[id(p)] for local, p in own.items() if id(p) in names}
        if trainable and isinstance(own.get("weight"), nn.Parameter):
            layers.append(Layer(module, rule, trainable))
    return layers


class Graph:
    """The autograd graph behind a tensor.

    Args:
        outputs: the tensor.
    """

    def __init__(self, outputs: Tensor) -> None:
        self.consumers: dict[Node, list[Node]] = defaultdict(list)
        self.leaves: dict[int, Node] = {}
        stack = [outputs.grad_fn] if outputs.grad_fn is not None else []
        self.nodes: set[Node] = set(stack)
        while stack:
            node = stack.pop()
            for following, _ in node.next_functions:
                if following is None:
                    continue
                self.consumers[following].append(node)
                if type(following).__name__ == "AccumulateGrad":
                    leaf = following.variable  # type: ignore[attr-defined]
                    self.leaves[id(leaf)] = following
                elif following not in self.nodes:
                    self.nodes.add(following)
                    stack.append(following)

    def uses(self, leaf: Tensor, layers: AbstractSet[Node]) -> int:
        """How often a leaf tensor is used.

        A node with one differentiable input (a transpose, a cast) is not a use itself: its
        results may be used several times, as when the forward pass takes a derivative.

        Args:
            leaf: the tensor.
            layers: the nodes that are the outputs of layers, which always are uses.
        """
        if id(leaf) not in self.leaves:
            return 0
        count, stack = 0, [self.leaves[id(leaf)]]
        while stack:
            for consumer in self.consumers[stack.pop()]:
                inputs = [node for node, _ in consumer.next_functions if node is not None]
                if consumer in layers or len(inputs) > 1 or not self.consumers[consumer]:
                    count += 1
                else:
                    stack.append(consumer)
        return count


class Tape:
    """Records the calls of layers in one forward pass (a context manager).

    Args:
        model: the network.
        parameters: its trainable parameters.
        layers: the layers to record.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, layers: Sequence[Layer]) -> None:
        self.model = model
        self.parameters = parameters
        self.layers = layers
        self.records: dict[nn.Module, list[Record]] = defaultdict(list)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Put the hooks in place, before all others, so that they see the raw output."""
        for layer in self.layers:
            self._handles.append(
                layer.module.register_forward_hook(self._record, prepend=True, with_kwargs=True)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks away, whatever happened."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if output.requires_grad:
            (value,) = (*args, *kwargs.values())
            # The edge is taken now: an in-place ReLU behind the layer would later stand
            # in the output tensor's own place.
            edge = get_gradient_edge(output)
            self.records[module].append(
                Record(value.detach(), value._version, edge, output[0].numel())
            )

    def pullbacks(
        self, inputs: tuple[Tensor, ...], outputs: Tensor, scores: Tensor, vectors_at_once: int
    ) -> Iterator[list[Pullback]]:
        """The pulled-back score vectors of the recorded pass, some vectors at a time.

        Args:
            inputs: the arguments of the network in the pass.
            outputs: what it returned, ``[n, c]``.
            scores: the score vectors, ``[k, n, c]``.
            vectors_at_once: how many vectors to pull back together.

        Yields:
            For each part of the vectors, pullbacks that together hold every parameter
            that takes part in the outputs, each once.
        """
        graph = Graph(outputs)
        covered = self._covered(graph, outputs.shape[0])
        by_rule = {name for layer, _ in covered for name in layer.names.values()}
        others = [
            name
            for name, parameter in self.parameters.items()
            if name not in by_rule and id(parameter) in graph.leaves
        ]
        edges = [record.edge for _, records in covered for record in records]

        for start in range(0, scores.shape[0], vectors_at_once):
            part = scores[start : start + vectors_at_once]
            last = start + vectors_at_once >= scores.shape[0]
            found: list[Pullback] = []
            if edges:
                gradients = iter(pull_back(outputs, edges, part, retain_graph=not last))
                for layer, records in covered:
                    dtype = accumulation_dtype(next(layer.module.parameters()).dtype)
                    calls = [
                        Call(_unchanged(r, layer).to(dtype), next(gradients).to(dtype))
                        for r in records
                    ]
                    found.append(layer.rule(layer.module, layer.names, calls))
            if others:
                found.append(PerExamplePullback(self.model, others, inputs, part))
            yield found

    def _covered(self, graph: Graph, num_examples: int) -> list[tuple[Layer, list[Record]]]:
        """The layers whose rule holds in this pass, with their calls."""
        outputs = {r.edge.node for records in self.records.values() for r in records}
        covered = []
        for layer in self.layers:
            records = [r for r in self.records[layer.module] if r.edge.node in graph.nodes]
            counted = all(
                graph.uses(layer.module.get_parameter(local), outputs) == len(records)
                for local in layer.names
            )
            by_example = all(r.input.shape[0] == num_examples for r in records)
            if records and counted and by_example:
                covered.append((layer, records))
        return covered

    def layers_in_order(self, outputs: Tensor, scores: Tensor) -> list[Layer]:
        """The layers in which row ``i`` belongs to example ``i``, in every call.

        A network may sort, flip or mix examples on the way.  Scaling the score of every
        example by a factor of its own must scale the rows of a layer's output gradient by
        the same factors.

        Args:
            outputs: what the recorded pass returned, ``[n, c]``.
            scores: its score vectors, ``[k, n, c]``.
        """
        covered = self._covered(Graph(outputs), outputs.shape[0])
        edges = [record.edge for _, records in covered for record in records]
        if not edges:
            return []
        score = scores.sum(0)
        generator = torch.Generator().manual_seed(0)
        factors = 2.0 ** torch.randint(4, (len(score),), generator=generator).to(score)
        plain = pull_back(outputs, edges, score[None], retain_graph=True)
        scaled = pull_back(outputs, edges, (factors[:, None] * score)[None], retain_graph=True)
        kept = []
        pairs = zip(plain, scaled, strict=True)
        for layer, records in covered:
            rows = [next(pairs) for _ in records]
            # Far from rounding, which is exact here, and from a factor of 2.
            if all(
                torch.allclose((g[0].flatten(1).T * factors).T, h[0].flatten(1), rtol=0.1, atol=0.0)
                for g, h in rows
            ):
                kept.append(layer)
        return kept

    def output_size(self) -> int:
        """Scalars that all recorded outputs hold for one example."""
        return sum(r.output_size for records in self.records.values() for r in records)


def layers_by_example(layers: Sequence[Layer], one: Tape, two: Tape) -> list[Layer]:
    """The layers whose first dimension, and no other, follows the batch size.

    Args:
        layers: the candidates.
        one: the tape of a pass over one example.
        two: the tape of a pass over two.
    """

    def shapes(tape: Tape, layer: Layer, batch: int) -> list[torch.Size] | None:
        inputs = [record.input for record in tape.records[layer.module]]
        if any(value.dim() < 2 or value.shape[0] != batch for value in inputs):
            return None
        return [value.shape[1:] for value in inputs]

    return [
        layer
        for layer in layers
        if (single := shapes(one, layer, 1)) is not None and single == shapes(two, layer, 2)
    ]


def pull_back(
    outputs: Tensor, edges: Sequence[GradientEdge], scores: Tensor, *, retain_graph: bool
) -> list[Tensor]:
    """Gradients of every score vector with respect to layer outputs, ``[k, n, ...]`` each."""
    if scores.shape[0] > 1:
        try:
            # The graph is kept in any case: a failure half-way must be able to start anew.
            with quiet_about_speed():
                return list(
                    torch.autograd.grad(
                        outputs, edges, scores, retain_graph=True, is_grads_batched=True
                    )
                )
        except RuntimeError:
            pass  # An operation that vmap cannot take: the vectors one after the other.
    rows = [
        torch.autograd.grad(
            outputs, edges, score, retain_graph=retain_graph or index + 1 < scores.shape[0]
        )
        for index, score in enumerate(scores)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _unchanged(record: Record, layer: Layer) -> Tensor:
    if "weight" in layer.names and record.input._version != record.version:
        raise RuntimeError(
            f"The input of {type(layer.module).__name__} "
            f"({', '.join(layer.names.values())}) was changed in place after the layer had "
            "used it: its weight's gradient is not defined, in training neither."
        )
    return record.input
