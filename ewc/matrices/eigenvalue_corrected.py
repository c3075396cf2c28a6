r"""The eigenvalue-corrected Kronecker structure (EKFAC)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ewc.linalg.squares import add_outer_squares
from ewc.matrices.block_diagonal import BlockDiagonalFisher, disjoint
from ewc.matrices.kronecker import KroneckerSum, layer_key, numbered_parts, weights_of
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import FisherMatrix
from ewc.matrices.sum import SumFisher
from ewc.parameters import Parameters, Shapes, shapes_of
from ewc.pullback.accumulator import Accumulator
from ewc.pullback.lookups import Lookups
from ewc.pullback.outer import OuterProducts
from ewc.pullback.pullback import Chunk


class EigenvalueCorrectedFisher(BlockDiagonalFisher):
    r"""EKFAC: the Kronecker eigenvectors of every layer with the eigenvalues that fit best.

    Per layer :math:`(Q_G \otimes Q_A)\, \mathrm{diag}(S)\, (Q_G \otimes Q_A)^\top` with the
    eigenvectors of the factors of :class:`~ewc.matrices.kronecker.KroneckerFisher` and
    :math:`S = \frac1N \sum_{n,k} (Q_G^\top V_{kn} Q_A)^2`, the second moments of the
    gradients along them (George et al. 2018, arXiv:1806.03884, equation 6): the best
    approximation with these eigenvectors, and with the exact trace.

    Takes two passes over the data.  Memory :math:`o^2 + i^2 + o i` a layer; ``matvec`` and
    ``solve`` :math:`2 o i (o + i)` operations.  Layers without a Kronecker form have their
    exact block, as in :class:`~ewc.matrices.kronecker.KroneckerFisher`.
    """

    form = EigenvalueCorrectedProduct

    @classmethod
    def accumulator(cls, parameters: Parameters, reduce: bool = False) -> Accumulator:
        """Empty Kronecker sums; the eigenvalues are summed in a second pass.

        Args:
            parameters: over which the matrix is.
            reduce: see :class:`~ewc.matrices.kronecker.KroneckerFisher`.
        """
        return _FirstPass(KroneckerSum(parameters, reduce))


class _FirstPass(Accumulator):
    """The Kronecker factors, whose eigenvectors the second pass needs."""

    passes = 2

    def __init__(self, kronecker: KroneckerSum) -> None:
        self.kronecker = kronecker

    def add(self, chunk: Chunk) -> None:
        """Add to the factors."""
        self.kronecker.add(chunk)

    def join(self, group: ProcessGroup) -> None:
        """Begin the factors that other processes have."""
        self.kronecker.join(group)

    def sums(self) -> dict[str, Tensor]:
        """The factors."""
        return self.kronecker.sums()

    def mean(self, num_examples: int) -> "SpectrumSum":
        """The sum of the second pass."""
        shapes = shapes_of(self.kronecker.parameters)
        return SpectrumSum(self.kronecker.terms(num_examples), shapes)


class SpectrumSum(Accumulator):
    r"""The running :math:`\sum_{n,k} (Q_G^\top V_{kn} Q_A)^2` of every Kronecker layer.

    Args:
        terms: the Kronecker products whose eigenvectors are taken, and all other blocks.
        shapes: all parameters.
    """

    def __init__(self, terms: Sequence[FisherMatrix], shapes: Shapes) -> None:
        self.rest: list[FisherMatrix] = []
        self.bases: dict[str, EigenvalueCorrectedProduct] = {}
        for block in terms:
            if isinstance(block, KroneckerProduct):
                eigen = block.eigen
                zero = torch.zeros_like(eigen.spectrum)
                key = layer_key(eigen.weights, lookups=eigen.inputs is None)
                self.bases[key] = EigenvalueCorrectedProduct(
                    eigen.weights, eigen.outputs, eigen.inputs, zero, block.num_examples
                )
            else:
                self.rest.append(block)
        self.shapes = shapes

    def add(self, chunk: Chunk) -> None:
        """Add the squares of one chunk of pulled-back vectors, in the eigenbases."""
        for _, pullbacks in numbered_parts(chunk):
            for pullback in pullbacks:
                if isinstance(pullback, OuterProducts):
                    self._add_outer(pullback)
                elif isinstance(pullback, Lookups):
                    self._add_lookups(pullback)

    def _add_outer(self, pullback: OuterProducts) -> None:
        if pullback.positions == 0:
            return
        basis = self.bases[layer_key(weights_of(pullback))]
        assert basis.inputs is not None
        for part in pullback.slices():
            a, g = pullback.factors(part)
            if pullback.bias is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
            add_outer_squares(a @ basis.inputs, g @ basis.outputs, basis.spectrum)

    def _add_lookups(self, pullback: Lookups) -> None:
        if pullback.indices.shape[1] == 0:
            return
        basis = self.bases[layer_key(weights_of(pullback), lookups=True)]
        g = pullback.gradient @ basis.outputs[0]
        shape = pullback.shapes[pullback.name]
        total = basis.spectrum.new_zeros(shape)
        rotated = Lookups(pullback.name, shape, pullback.indices, g, memory=pullback.memory)
        rotated.add_squares({pullback.name: total})
        basis.spectrum += total.T

    def sums(self) -> dict[str, Tensor]:
        """The eigenvalues, by weight."""
        return {name: basis.spectrum for name, basis in self.bases.items()}

    def mean(self, num_examples: int) -> EigenvalueCorrectedFisher:
        """The mean matrix."""
        corrected: Sequence[FisherMatrix] = [
            basis.scaled(1 / num_examples) for basis in self.bases.values()
        ]
        blocks = disjoint([*corrected, *self.rest], num_examples)
        return EigenvalueCorrectedFisher(blocks, self.shapes, num_examples)


def nearest_in_eigenbasis(
    fisher: FisherMatrix, basis: EigenvalueCorrectedFisher
) -> EigenvalueCorrectedFisher:
    """The matrix with another's eigenvectors that is nearest to a sum of EKFAC matrices.

    In the Frobenius norm, layer by layer, and with the same trace; exact blocks are added
    exactly.

    Args:
        fisher: an :class:`EigenvalueCorrectedFisher`, or what ``+`` made of several.
        basis: one over the same layers, whose eigenvectors are taken.

    Raises:
        ValueError: it is no such sum, or over other layers.
    """
    if not isinstance(fisher, BlockDiagonalFisher):
        raise ValueError(  # noqa: TRY004 - the sum's terms are at fault, not its type
            f"{type(fisher).__name__} is no sum of eigenvalue-corrected matrices over the same "
            "layers: only such a sum has a nearest one."
        )
    bases = {tuple(block.shapes): block for block in basis.blocks}
    blocks: list[FisherMatrix] = []
    for block in fisher.blocks:
        terms = block.terms if isinstance(block, SumFisher) else [block]
        own = bases.get(tuple(block.shapes))
        corrected = [term for term in terms if isinstance(term, EigenvalueCorrectedProduct)]
        if isinstance(own, EigenvalueCorrectedProduct) and len(corrected) == len(terms):
            spectrum = torch.stack([term.seen_in(own) for term in corrected]).sum(0)
            blocks.append(
                EigenvalueCorrectedProduct(
                    own.weights, own.outputs, own.inputs, spectrum, block.num_examples
                )
            )
        elif len(terms) == 1 and not corrected:
            blocks.append(block)
        else:
            raise ValueError(
                f"The block of {', '.join(block.shapes)} is no sum of eigenvalue-corrected "
                "matrices of the layer of the basis: only such a sum has a nearest one."
            )
    return EigenvalueCorrectedFisher(blocks, fisher.shapes, fisher.num_examples)
