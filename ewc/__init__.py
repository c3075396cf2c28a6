"""Fisher information of neural networks, and Elastic Weight Consolidation on top of it.

- the pass over the data: :func:`fisher_information`; :func:`sampled_fisher` with an
  error bar
- how the expectation is taken: :class:`Exact`, :class:`MonteCarlo`, :class:`Empirical`
- what of the matrix is kept: :class:`DiagonalFisher`, :class:`BlockDiagonalFisher`,
  :class:`KroneckerFisher` (K-FAC), :class:`EigenvalueCorrectedFisher` (EKFAC),
  :class:`LowRankFisher`, :class:`DenseFisher`, :class:`ImplicitFisher`, each a
  :class:`FisherMatrix`; :func:`nearest_kronecker` projects sums of Kronecker matrices
- what a network's outputs mean: :class:`Categorical`, :class:`Bernoulli`,
  :class:`Gaussian`, :class:`Poisson`, each a :class:`Likelihood`; :class:`SmoothedCategorical`
  for the information of networks that are sure of everything
- Elastic Weight Consolidation: :class:`EWCPenalty`, with :class:`Separate` or
  :class:`Online`; the Avalanche plugin is :class:`ewc.plugin.EWCPlugin`

The names here import neither Avalanche nor Hydra nor W&B.
"""

from ewc.consolidation.consolidation import Online, Separate
from ewc.fisher import (
    BlockDiagonalFisher,
    DenseFisher,
    DiagonalFisher,
    EigenvalueCorrectedFisher,
    Empirical,
    Exact,
    FisherMatrix,
    ImplicitFisher,
    KroneckerFisher,
    LowRankFisher,
    MonteCarlo,
    fisher_information,
    nearest_kronecker,
    sampled_fisher,
)
from ewc.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from ewc.parameters import Parameters
from ewc.penalty import EWCPenalty
from ewc.smoothed_categorical import SmoothedCategorical

__all__ = [
    "Bernoulli",
    "BlockDiagonalFisher",
    "Categorical",
    "DenseFisher",
    "DiagonalFisher",
    "EWCPenalty",
    "EigenvalueCorrectedFisher",
    "Empirical",
    "Exact",
    "FisherMatrix",
    "Gaussian",
    "ImplicitFisher",
    "KroneckerFisher",
    "Likelihood",
    "LowRankFisher",
    "MonteCarlo",
    "Online",
    "Parameters",
    "Poisson",
    "Separate",
    "SmoothedCategorical",
    "fisher_information",
    "nearest_kronecker",
    "sampled_fisher",
]
__version__ = "0.1.0"
