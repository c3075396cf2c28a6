"""Fisher matrices: algebra only, without a network or data."""

from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.dense import DenseFisher
from ewc.matrices.diagonal import DiagonalFisher
from ewc.matrices.eigenvalue_corrected import EigenvalueCorrectedFisher
from ewc.matrices.kronecker import KroneckerFisher, nearest_kronecker
from ewc.matrices.low_rank import LowRankFisher
from ewc.matrices.matrix import DampedInverse, FisherMatrix, SumFisher

__all__ = [
    "BlockDiagonalFisher",
    "DampedInverse",
    "DenseFisher",
    "DiagonalFisher",
    "EigenvalueCorrectedFisher",
    "FisherMatrix",
    "KroneckerFisher",
    "LowRankFisher",
    "SumFisher",
    "nearest_kronecker",
]
