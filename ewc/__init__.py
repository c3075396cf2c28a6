"""Fisher information of neural networks, and Elastic Weight Consolidation on top of it.

- the pass over the data: :func:`fisher_information`; :mod:`ewc.fisher` has
  :func:`~ewc.fisher.sampled_fisher` besides, with an error bar
- how the expectation is taken: :class:`Exact`, :class:`MonteCarlo`, :class:`Empirical`
- what of the matrix to keep: :class:`Diagonal`, :class:`BlockDiagonal`, :class:`Kronecker`
  (K-FAC), :class:`EigenvalueCorrected` (EKFAC), :class:`LowRank`, :class:`Dense`,
  :class:`Implicit`
- what comes back: a :class:`FisherMatrix` such as :class:`DiagonalFisher`,
  :class:`KroneckerFisher` or :class:`DenseFisher`; all kinds are in :mod:`ewc.matrices`
- what a network's outputs mean: :class:`Categorical`, :class:`SmoothedCategorical`,
  :class:`Bernoulli`, :class:`Gaussian`, :class:`Poisson`, each a :class:`Likelihood`
- Elastic Weight Consolidation: :class:`EWCPenalty` with :class:`Separate` or
  :class:`Online`; the Avalanche plugin is :class:`ewc.plugin.EWCPlugin`

These names import neither Avalanche nor Hydra nor W&B.
"""

from ewc.consolidation.combination import Online, Separate
from ewc.fisher import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    Exact,
    Implicit,
    Kronecker,
    LowRank,
    MonteCarlo,
    fisher_information,
)
from ewc.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    SmoothedCategorical,
)
from ewc.matrices import DenseFisher, DiagonalFisher, FisherMatrix, KroneckerFisher
from ewc.parameters import Parameters
from ewc.penalty import EWCPenalty

__all__ = [
    "Bernoulli",
    "BlockDiagonal",
    "Categorical",
    "Dense",
    "DenseFisher",
    "Diagonal",
    "DiagonalFisher",
    "EWCPenalty",
    "EigenvalueCorrected",
    "Empirical",
    "Exact",
    "FisherMatrix",
    "Gaussian",
    "Implicit",
    "Kronecker",
    "KroneckerFisher",
    "Likelihood",
    "LowRank",
    "MonteCarlo",
    "Online",
    "Parameters",
    "Poisson",
    "Separate",
    "SmoothedCategorical",
    "fisher_information",
]
__version__ = "0.1.0"
