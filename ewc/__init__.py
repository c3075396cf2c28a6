"""Fisher information of neural networks, and Elastic Weight Consolidation on top of it.

- the pass over the data: :func:`fisher_information`
- how the expectation is taken: :class:`Exact`, :class:`MonteCarlo`, :class:`Empirical`
- what of the matrix is kept: :class:`DiagonalFisher`, :class:`DenseFisher`, both a
  :class:`FisherMatrix`
- what a network's outputs mean: :class:`Categorical`, :class:`Gaussian`, each a
  :class:`Likelihood`
- Elastic Weight Consolidation: :class:`EWCPenalty`, with :class:`Separate` or
  :class:`Online`; the Avalanche plugin is :class:`ewc.plugin.EWCPlugin`

The names here import neither Avalanche nor Hydra nor W&B.
"""

from ewc.consolidation import Online, Separate
from ewc.fisher import (
    DenseFisher,
    DiagonalFisher,
    Empirical,
    Exact,
    FisherMatrix,
    MonteCarlo,
    fisher_information,
)
from ewc.likelihoods import Categorical, Gaussian, Likelihood
from ewc.parameters import Parameters
from ewc.penalty import EWCPenalty

__all__ = [
    "Categorical",
    "DenseFisher",
    "DiagonalFisher",
    "EWCPenalty",
    "Empirical",
    "Exact",
    "FisherMatrix",
    "Gaussian",
    "Likelihood",
    "MonteCarlo",
    "Online",
    "Parameters",
    "Separate",
    "fisher_information",
]
__version__ = "0.1.0"
