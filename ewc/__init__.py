"""Fisher information of neural networks, and Elastic Weight Consolidation on top of it.

The names here import neither Avalanche nor Hydra nor W&B.  The Avalanche plugin is
:class:`ewc.plugin.EWCPlugin`.
"""

# Fisher information: the pass over the data, estimators, structures.
from ewc.fisher import (
    DenseFisher,
    DiagonalFisher,
    Empirical,
    Exact,
    FisherMatrix,
    MonteCarlo,
    fisher_information,
)

# What a network's outputs mean.
from ewc.likelihoods import Categorical, Gaussian, Likelihood

# Vectors over the parameters.
from ewc.parameters import Parameters

# Elastic Weight Consolidation.
from ewc.penalty import EWCPenalty, Online, Separate

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
