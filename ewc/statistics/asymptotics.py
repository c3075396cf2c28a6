r"""Errors, intervals and tests of the maximum likelihood estimate.

With ``N`` independent examples the estimate is approximately normal around the truth.  Its
covariance is :math:`(N F)^{-1}` if the family holds the truth.  Otherwise it is the sandwich
:math:`H^{-1} S H^{-1} / N` of the expected curvature ``H`` and the second moments ``S`` of the
scores (White 1982, doi:10.2307/1912526; van der Vaart 1998, Asymptotic Statistics, chapter 5).
"""

from dataclasses import dataclass

import torch
from scipy.special import chdtrc, ndtri
from torch import Tensor

from ewc.checks import check_count, is_number
from ewc.matrices.matrix import FisherMatrix
from ewc.parameters import Parameters, check_same_shapes, shapes_of
from ewc.statistics.bounds import Function, cramer_rao_bound, jacobian_of


def standard_errors(fisher: FisherMatrix, *, prior_precision: float = 0.0) -> Parameters:
    r"""The standard errors :math:`\sqrt{\mathrm{diag}\,(N F + \delta I)^{-1}}`, by parameter.

    Any structure will do.  A diagonal, Kronecker, eigenvalue-corrected or low-rank matrix of a
    whole network needs no dense matrix.  What a structure leaves out of ``F`` is missing from
    the errors.  A diagonal gives the errors with all other parameters known: they are too small.

    Args:
        fisher: the mean information of the examples at the estimate.
        prior_precision: :math:`\delta` of a normal prior.  It must be above 0 where ``F`` is
            singular, as for every overparametrised network.

    Raises:
        ValueError: the prior precision is negative or not finite.
        torch.linalg.LinAlgError: the precision is singular.
    """
    variances = fisher.precision.inverse_diagonal(prior_precision)
    return {name: variance.sqrt() for name, variance in variances.items()}


def robust_covariance(fisher: FisherMatrix, scores: FisherMatrix) -> Tensor:
    r"""The sandwich :math:`H^{-1} S H^{-1} / N`, ``[p, p]`` in the flat order.

    This is the covariance of the estimate, whether the family is right or not.  The square
    roots of its diagonal are robust standard errors (``HC0`` for linear models).

    Args:
        fisher: ``H``, the information under the model (``estimator=Exact()``) at the estimate.
            It is the curvature where the outputs are natural parameters of the likelihood.
        scores: ``S``, the second moments of the observed scores, ``estimator=Empirical()``,
            over the same examples.

    Raises:
        ValueError: the matrices are over different parameters or numbers of examples.
        torch.linalg.LinAlgError: ``H`` is singular.
    """
    check_same_shapes(scores.shapes, fisher.shapes, "The matrix of the scores")
    if scores.num_examples != fisher.num_examples:
        raise ValueError(
            f"scores must be over the same {fisher.num_examples} examples as fisher, got "
            f"{scores.num_examples}."
        )
    meat = scores.embedded(fisher.shapes).to_dense()  # in the order of the other
    factor = torch.linalg.cholesky(fisher.to_dense())
    left = torch.cholesky_solve(meat, factor)
    return torch.cholesky_solve(left.mT, factor) / fisher.num_examples


def confidence_intervals(
    parameters: Parameters, errors: Parameters, level: float = 0.95
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""The intervals :math:`\hat\theta \pm z \cdot \mathrm{error}`, by parameter.

    Args:
        parameters: the estimates.
        errors: their standard errors, from :func:`standard_errors` or of a robust covariance.
        level: the probability that an interval holds the truth, as ``N`` grows.

    Returns:
        The lower and the upper end, by parameter.

    Raises:
        ValueError: the level is not between 0 and 1, or names or shapes differ.
    """
    if not (is_number(level) and 0 < level < 1):
        raise ValueError(f"level must lie between 0 and 1, got {level!r}.")
    estimates = {name: parameters[name] for name in errors if name in parameters}
    check_same_shapes(shapes_of(estimates), shapes_of(errors), "The set of parameters")
    z = float(ndtri((1 + level) / 2))
    return {n: (estimates[n] - z * error, estimates[n] + z * error) for n, error in errors.items()}


@dataclass(frozen=True)
class ChiSquaredTest:
    r"""A test whose statistic is chi-squared under the null hypothesis, as ``N`` grows.

    Attributes:
        statistic: the value of the statistic.
        degrees_of_freedom: the number of restrictions of the null hypothesis.
    """

    statistic: float
    degrees_of_freedom: int

    @property
    def p_value(self) -> float:
        """The probability of a statistic at least this large under the null hypothesis."""
        return float(chdtrc(self.degrees_of_freedom, self.statistic))


def wald_test(
    function: Function,
    parameters: Parameters,
    fisher: FisherMatrix,
    *,
    covariance: Tensor | None = None,
) -> ChiSquaredTest:
    r"""Wald's test of :math:`g(\theta) = 0`: :math:`g^\top (J \Sigma J^\top)^{-1} g`.

    It needs the full fit only (Wald 1943, doi:10.1090/S0002-9947-1943-0012401-3).

    Args:
        function: ``g``, to a tensor with one entry for each restriction.
        parameters: the estimate.
        fisher: the mean information of the examples at the estimate.
        covariance: :math:`\Sigma`, ``[p, p]``, such as :func:`robust_covariance`;
            ``None`` for :math:`(N F)^{-1}`.

    Raises:
        ValueError: the parameters are not those of ``fisher``.
        torch.linalg.LinAlgError: a covariance is singular.
    """
    check_same_shapes(shapes_of(parameters), fisher.shapes, "The set of parameters")
    here = {name: parameters[name].detach().to(fisher.dtype) for name in fisher.shapes}
    value = function(here).reshape(-1)
    if covariance is None:
        spread = cramer_rao_bound(
            fisher, fisher.num_examples, parameters=parameters, function=function
        )
    else:
        jacobian = jacobian_of(function, parameters, fisher)
        spread = jacobian @ covariance @ jacobian.mT
    statistic = value @ torch.linalg.solve(spread, value)
    return ChiSquaredTest(float(statistic), len(value))


def score_test(score: Parameters, fisher: FisherMatrix, degrees_of_freedom: int) -> ChiSquaredTest:
    r"""Rao's score test: :math:`s^\top (N F)^{-1} s`.

    It needs the restricted fit only (Rao 1948, doi:10.1017/S0305004100023987).

    Args:
        score: :math:`s`, the gradient of the log-likelihood, summed over the examples, with
            respect to all parameters at the restricted fit.
        fisher: the mean information there, over all parameters.
        degrees_of_freedom: the number of restrictions.

    Raises:
        ValueError: the score is not over the parameters of ``fisher``, or there is no
            restriction.
        torch.linalg.LinAlgError: the information is singular.
    """
    check_count(degrees_of_freedom, "degrees_of_freedom")
    solved = fisher.solve(score, damping=0.0)
    product = sum(float((score[n].double() * solved[n].double()).sum()) for n in fisher.shapes)
    return ChiSquaredTest(product / fisher.num_examples, degrees_of_freedom)


def likelihood_ratio_test(
    log_likelihood: float, restricted: float, degrees_of_freedom: int
) -> ChiSquaredTest:
    r"""The likelihood-ratio test: twice the gain in log-likelihood (Wilks 1938).

    Args:
        log_likelihood: of the full fit, summed over the examples, in nats.
        restricted: of the restricted fit.
        degrees_of_freedom: the number of restrictions.

    Raises:
        ValueError: the restricted fit is the better one, so one of the two is not a maximum;
            or there is no restriction.
    """
    check_count(degrees_of_freedom, "degrees_of_freedom")
    gain = 2 * (log_likelihood - restricted)
    if not gain >= -1e-6 * max(1.0, abs(log_likelihood)):
        raise ValueError(
            f"restricted must not be above log_likelihood, {log_likelihood}, got {restricted}: "
            "both fits must be maxima."
        )
    return ChiSquaredTest(max(gain, 0.0), degrees_of_freedom)
