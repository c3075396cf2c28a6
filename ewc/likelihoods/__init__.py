"""What a network's outputs mean: the likelihood of a target given the outputs."""

from ewc.likelihoods.bernoulli import Bernoulli
from ewc.likelihoods.categorical import Categorical
from ewc.likelihoods.gaussian import Gaussian, GaussianWithVariance
from ewc.likelihoods.likelihood import Likelihood, check_likelihood
from ewc.likelihoods.poisson import Poisson
from ewc.likelihoods.smoothed_categorical import SmoothedCategorical

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "GaussianWithVariance",
    "Likelihood",
    "Poisson",
    "SmoothedCategorical",
    "check_likelihood",
]
