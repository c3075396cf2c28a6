r"""Which model to take: information criteria and the Laplace approximation of the evidence.

All take the log-likelihood of the fit in nats, summed over the examples.  The criteria are on
the scale of the deviance: smaller is better.  The evidence is a log-probability: larger is
better.
"""

import math

import torch
from torch import Tensor

from ewc.checks import check_count, check_not_negative, check_positive
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, flatten, shapes_of


def aic(log_likelihood: float, num_parameters: int) -> float:
    r"""Akaike's criterion :math:`-2 \log L + 2 p` (Akaike 1974, doi:10.1109/TAC.1974.1100705).

    Args:
        log_likelihood: the log-likelihood of the fit, in nats.
        num_parameters: ``p``.

    Raises:
        ValueError: the number of parameters is negative.
    """
    check_count(num_parameters, "num_parameters", least=0)
    return -2 * log_likelihood + 2 * num_parameters


def bic(log_likelihood: float, num_parameters: int, num_examples: int) -> float:
    r"""The Bayesian criterion :math:`-2 \log L + p \log N` (Schwarz 1978).

    It is the leading part of minus twice the Laplace evidence as ``N`` grows
    (doi:10.1214/aos/1176344136).

    Args:
        log_likelihood: the log-likelihood of the fit, in nats.
        num_parameters: ``p``.
        num_examples: ``N``.

    Raises:
        ValueError: ``num_parameters`` is negative, or ``num_examples`` below 1.
    """
    check_count(num_parameters, "num_parameters", least=0)
    check_count(num_examples, "num_examples")
    return -2 * log_likelihood + num_parameters * math.log(num_examples)


def tic(log_likelihood: float, fisher: FisherMatrix, scores: FisherMatrix) -> float:
    r"""Takeuchi's criterion :math:`-2 \log L + 2 \, \mathrm{tr}(H^{-1} S)` (Takeuchi 1976).

    Unlike Akaike's criterion it does not assume that the model holds the truth.  Where the
    model does, :math:`S = H` and the trace is ``p``.

    Args:
        log_likelihood: the log-likelihood of the fit, in nats.
        fisher: ``H``, the expected curvature, ``estimator=Exact()``.
        scores: ``S``, the second moments of the scores, ``estimator=Empirical()``.

    Raises:
        ValueError: the matrices are over different parameters.
        torch.linalg.LinAlgError: ``H`` is singular.
    """
    return -2 * log_likelihood + 2 * effective_parameters(fisher, scores)


def effective_parameters(
    fisher: FisherMatrix, scores: FisherMatrix, *, prior_precision: float = 0.0
) -> float:
    r"""The trace :math:`\mathrm{tr}\,(H + \tfrac{\delta}{N} I)^{-1} S`: Takeuchi's penalty.

    The deviance on the training examples underestimates that on as many new examples.  The
    mean difference is twice this trace.

    Args:
        fisher: ``H``.
        scores: ``S``.
        prior_precision: :math:`\delta` of the normal prior of a penalised fit.

    Raises:
        ValueError: the matrices are over different parameters, or the precision is
            negative or not finite.
        torch.linalg.LinAlgError: the damped ``H`` is singular.
    """
    check_same_shapes(scores.shapes, fisher.shapes, "The matrix of the scores")
    check_not_negative(prior_precision, "prior_precision")
    damped = fisher.to_dense()
    damped.diagonal().add_(prior_precision / fisher.num_examples)
    meat = scores.embedded(fisher.shapes).to_dense()  # in the order of the other
    return float(torch.cholesky_solve(meat, torch.linalg.cholesky(damped)).trace())


def laplace_log_evidence(
    log_likelihood: float | Tensor,
    fisher: FisherMatrix,
    parameters: Parameters,
    prior_precision: float,
    *,
    prior_mean: Parameters | None = None,
) -> float:
    r"""The log-probability of the data with all parameters integrated out (MacKay 1992).

    .. math:: \log p(D) \approx \log L(\hat\theta)
              - \tfrac{\delta}{2} \|\hat\theta - \mu\|^2 + \tfrac{p}{2} \log \delta
              - \tfrac12 \log \det (N F + \delta I)

    at the mode :math:`\hat\theta` of the posterior with the prior
    :math:`N(\mu, \delta^{-1} I)` (doi:10.1162/neco.1992.4.3.415).  It is exact for a linear
    model with a Gaussian likelihood and a :class:`~ewc.DenseFisher`.  The determinant of a
    diagonal or Kronecker matrix has a closed form.

    Args:
        log_likelihood: the log-likelihood at the mode, in nats, summed over the examples.
        fisher: the mean information of the examples at the mode.
        parameters: the mode.
        prior_precision: :math:`\delta`, above 0.
        prior_mean: :math:`\mu`; ``None`` for 0.

    Raises:
        ValueError: the precision is not a finite number above 0, or the parameters are not
            those of ``fisher``.
    """
    check_positive(prior_precision, "prior_precision")
    check_same_shapes(shapes_of(parameters), fisher.shapes, "The set of parameters")
    away = flatten({name: parameters[name] for name in fisher.shapes}).double()
    if prior_mean is not None:
        check_same_shapes(shapes_of(prior_mean), fisher.shapes, "The prior mean")
        away = away - flatten({name: prior_mean[name] for name in fisher.shapes}).double()
    prior = 0.5 * fisher.num_parameters * math.log(prior_precision)
    prior -= 0.5 * prior_precision * float(away.square().sum())
    return float(log_likelihood) + prior - 0.5 * float(fisher.precision.logdet(prior_precision))
