r"""The Kronecker-factored Fisher information (K-FAC)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ewc.fisher.accumulator import Accumulator
from ewc.fisher.block_diagonal import BlockDiagonalFisher, by_layer
from ewc.fisher.dense import BlockSums, DenseFisher
from ewc.fisher.diagonal import DiagonalFisher
from ewc.fisher.gram import Block, GramSum, RowBlock
from ewc.fisher.kronecker_product import KroneckerProduct
from ewc.fisher.layer_matrix import LayerWeights
from ewc.fisher.lookups import Lookups
from ewc.fisher.matrix import FisherMatrix
from ewc.fisher.outer import OuterProducts, WeightLayout
from ewc.fisher.pullback import Chunk, Pullback
from ewc.fisher.truncated_product import TruncatedProduct
from ewc.parameters import Parameters, accumulation_dtype, shapes_of


class KroneckerFisher(BlockDiagonalFisher):
    r"""K-FAC: :math:`F_l \approx G_l \otimes A_l` for every layer (Martens & Grosse 2015).

    :math:`G = \frac1N \sum_{n,k,t} g g^\top` are the second moments of the gradients with
    respect to the layer's outputs, :math:`A = \frac1{N T} \sum_{n,t} a a^\top` those of its
    inputs with a 1 appended for the bias (arXiv:1503.05671, equation 1).  A weight that is
    used at ``T`` positions (convolutions, sequences, repeated calls) takes all of them as
    examples of their own: K-FAC-expand (Eschenhagen et al. 2023, arXiv:2311.00636,
    equation 22).  With ``KroneckerFisher.configured(reduce=True)`` the inputs are averaged
    and the gradients summed over positions first: K-FAC-reduce (equation 23), exact where
    a linear network averages over positions.

    The matrix is exact for a deep linear network with a Gaussian likelihood, and for a
    single example; the layers' inputs and gradients are otherwise taken to be independent.
    A layer that is not of this form (a normalisation, a weight tied to an embedding, what
    no rule covers) has its exact dense block instead, and printing says so.

    Memory :math:`o^2 + i^2` a layer; ``matvec`` :math:`o i (o + i)` operations; ``solve``,
    ``logdet`` and ``eigenvalues`` once :math:`o^3 + i^3`.  A sum of two is exact and lazy;
    :func:`~ewc.fisher.nearest_kronecker.nearest_kronecker` makes one product of it.
    """

    form = KroneckerProduct | TruncatedProduct

    @classmethod
    def accumulator(cls, parameters: Parameters, reduce: bool = False) -> Accumulator:
        """Empty factors.

        Args:
            parameters: over which the matrix is.
            reduce: whether to reduce over positions before taking second moments.
        """
        return KroneckerSum(parameters, reduce)


class KroneckerSum(Accumulator):
    """The running second moments of every layer's inputs and output gradients.

    Args:
        parameters: over which the matrix is.
        reduce: whether to reduce over positions first.
    """

    def __init__(self, parameters: Parameters, reduce: bool = False) -> None:
        self.parameters = parameters
        self.reduce = reduce
        self.layers: dict[str, LayerSums] = {}
        self.rest = BlockSums({}, next(iter(parameters.values())))
        self._kinds: dict[str, str] = {}

    def add(self, chunk: Chunk) -> None:
        """Add one chunk of pulled-back vectors."""
        for number, pullbacks in enumerate(chunk.pullbacks()):
            rest: list[Pullback] = []
            for pullback in pullbacks:
                # The inputs are the same for every part of the vectors.
                if isinstance(pullback, OuterProducts):
                    self._add_outer(pullback, with_inputs=number == 0)
                elif isinstance(pullback, Lookups):
                    self._add_lookups(pullback, with_inputs=number == 0)
                else:
                    rest.append(pullback)
            self._add_rest(rest)

    def _add_outer(self, pullback: OuterProducts, *, with_inputs: bool) -> None:
        weights = LayerWeights(pullback.weight, pullback.bias, pullback.layout)
        layer = self._layer(weights, pullback.memory)
        assert isinstance(layer.inputs, GramSum)
        for part in pullback.slices():
            inputs: list[Block]
            outputs: list[Block]
            if self.reduce:
                a, g = pullback.factors(part)
                mean = RowBlock(a.detach().mean(2).transpose(0, 1))
                inputs = [mean] if with_inputs else []
                outputs = [RowBlock(g.sum(3).flatten(0, 1).transpose(0, 1))]
                share = 1.0
            else:
                inputs = [use.input_rows(part) for use in pullback.uses] if with_inputs else []
                outputs = [use.gradient_rows(part) for use in pullback.uses]
                share = 1 / pullback.positions
            for block in outputs:
                layer.outputs.add(block)
            for block in inputs:
                layer.inputs.add(block, share)
                if pullback.bias is not None:
                    layer.sums += share * block.sum()
                    layer.count += share * block.count

    def _add_lookups(self, pullback: Lookups, *, with_inputs: bool) -> None:
        """An embedding is linear in one-hot inputs, whose second moments are diagonal."""
        shape = pullback.shapes[pullback.name]
        weights = LayerWeights(pullback.name, None, WeightLayout(shape, transposed=True))
        layer = self._layer(weights, pullback.memory, lookups=True)
        layer.outputs.add(RowBlock(pullback.gradient.flatten(0, 2)[None]))
        if with_inputs:
            counts = torch.bincount(pullback.indices.flatten(), minlength=shape[0])
            if pullback.padding is not None:
                counts[pullback.padding] = 0
            layer.sums[0] += counts.to(layer.sums) / pullback.indices.shape[1]

    def _layer(self, weights: LayerWeights, memory: int, *, lookups: bool = False) -> "LayerSums":
        self._check_use(weights.shapes, f"a Kronecker product {weights.bias} {weights.layout}")
        if weights.weight not in self.layers:
            like = self.parameters[weights.weight].detach()
            like = like.new_empty(0, dtype=accumulation_dtype(like.dtype))
            self.layers[weights.weight] = LayerSums(weights, like, memory, lookups=lookups)
        return self.layers[weights.weight]

    def _add_rest(self, pullbacks: Sequence[Pullback]) -> None:
        present = {name for pullback in pullbacks for name in pullback.shapes}
        shapes = shapes_of({n: p for n, p in self.parameters.items() if n in present})
        for group in by_layer(shapes).values():
            self._check_use(group, f"a block of {', '.join(group)}")
            self.rest.include(", ".join(group), group)
        if pullbacks:
            self.rest.add(pullbacks)

    def _check_use(self, names: Mapping[str, Any], kind: str) -> None:
        """Check that parameters take part in every batch in the same way.

        Raises:
            ValueError: they do not, so that no one form holds for their mean.
        """
        for name in names:
            if self._kinds.setdefault(name, kind) != kind:
                raise ValueError(
                    f"Parameter {name!r} is used in different ways in different batches: a "
                    "Kronecker Fisher needs one; batches of one task each often help."
                )

    def sums(self) -> dict[str, Tensor]:
        """The factors by weight, and the exact blocks."""
        found = {f"block {key}": total for key, total in self.rest.totals.items()}
        for layer in self.layers.values():
            found |= layer.tensors()
        return found

    def mean(self, num_examples: int) -> KroneckerFisher:
        """The mean factors and blocks; parameters that took no part have zeros."""
        blocks: list[FisherMatrix] = [layer.mean(num_examples) for layer in self.layers.values()]
        blocks += [
            DenseFisher(self.rest.totals[key].div_(num_examples), shapes, num_examples)
            for key, shapes in self.rest.blocks.items()
        ]
        seen = {name for block in blocks for name in block.shapes}
        for name, parameter in self.parameters.items():
            if name not in seen:
                zeros = torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype))
                blocks.append(DiagonalFisher({name: zeros.detach()}, num_examples))
        return KroneckerFisher(blocks, shapes_of(self.parameters), num_examples)


class LayerSums:
    """The running second moments of one layer.

    Args:
        weights: the layer's parameters.
        like: a tensor whose device and type the sums have.
        memory: bytes that collected rows may take.
        lookups: whether the inputs are one-hot, with diagonal second moments.
    """

    def __init__(
        self, weights: LayerWeights, like: Tensor, memory: int, *, lookups: bool = False
    ) -> None:
        groups, outputs, inputs = weights.layout.matrix_shape
        self.weights = weights
        self.outputs = GramSum(groups, outputs, like, memory)
        self.inputs = None if lookups else GramSum(groups, inputs, like, memory)
        self.sums = like.new_zeros(groups, inputs)
        """The sums of the inputs; of one-hot inputs they are the second moments."""
        self.count = like.new_zeros(())

    def tensors(self) -> dict[str, Tensor]:
        """All sums, by names that are the same in every process."""
        name = self.weights.weight
        found = {f"outputs {name}": self.outputs.flush(), f"sums {name}": self.sums}
        found[f"count {name}"] = self.count
        if self.inputs is not None:
            found[f"inputs {name}"] = self.inputs.flush()
        return found

    def mean(self, num_examples: int) -> KroneckerProduct:
        """The mean factors; the bias's input is always 1."""
        outputs = self.outputs.flush().div_(num_examples)
        if self.inputs is None:
            inputs = self.sums.div_(num_examples)
        else:
            inputs = self.inputs.flush().div_(num_examples)
            if self.weights.bias is not None:
                sums = self.sums.div_(num_examples)[:, :, None]
                inputs = torch.cat([inputs, sums], 2)
                one = (self.count / num_examples).expand(len(sums), 1, 1)
                last = torch.cat([sums.transpose(1, 2), one], 2)
                inputs = torch.cat([inputs, last], 1)
        return KroneckerProduct(self.weights, outputs, inputs, num_examples)
