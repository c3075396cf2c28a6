"""Real-valued outputs with normal noise, of known or learned variance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.checks import check_positive
from ewc.likelihoods.entries import along_axes, check_shape, uniform
from ewc.likelihoods.likelihood import Likelihood, summed

LOG_TWO_PI = math.log(2 * math.pi)

NOT_FINITE = "Targets of the Gaussian likelihood must be finite."


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Independent outputs of known variance: :math:`y_k \sim N(f_k, \sigma_k^2)`.

    Targets have the shape of the outputs, whatever it is.  The score is
    :math:`(y - f) / \sigma^2` and the Fisher information of the outputs :math:`I / \sigma^2`.
    The matching training loss is :math:`\|y - f\|^2 / (2 \sigma^2)`, summed over outputs and
    averaged over examples.

    Attributes:
        variance: :math:`\sigma^2`, in the squared unit of the targets: a number, or a tuple with
            one number for every output (channel).

    Raises:
        ValueError: a variance is not a finite number above 0.
    """

    variance: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        """Check the variance."""
        if isinstance(self.variance, tuple):
            for variance in self.variance:
                check_positive(variance, "a variance")
        else:
            check_positive(self.variance, "variance")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`-\frac12 \sum_k (y_k - f_k)^2 / \sigma_k^2 + \log 2 \pi \sigma_k^2`, ``[n]``."""
        variance = self._variance(outputs)
        return -0.5 * summed((targets - outputs).square() / variance + variance.log() + LOG_TWO_PI)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`(y_n - f_n) / \sigma^2`, the outputs' shape."""
        return (targets.to(outputs.dtype) - outputs) / self._variance(outputs)

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`e_k / \sigma_k` for each of the ``c`` outputs, ``[c, n, ...]``."""
        return along_axes(torch.ones_like(outputs) * self._variance(outputs).rsqrt())

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Targets by inversion of the normal distribution, ``[num_samples, n, ...]``."""
        noise = _standard_normal(outputs, num_samples, generator)
        return outputs + self._variance(outputs).sqrt() * noise

    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r""":math:`\sum_k (f_k - f'_k)^2 / (2 \sigma_k^2)` in nats, shape ``[n]``."""
        return summed((outputs - other).square() / (2 * self._variance(outputs)), weights)

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that there is a variance for every output.

        Raises:
            ValueError: their number is another.
        """
        dim = self.channel_dim(outputs)
        channels = 1 if dim is None else outputs.shape[dim]
        if isinstance(self.variance, tuple) and len(self.variance) != channels:
            raise ValueError(
                f"variance must be a number or one for each of the {channels} outputs, got "
                f"{len(self.variance)} for outputs of shape {list(outputs.shape)}."
            )

    def check_target_shape(self, outputs: Tensor, targets: Tensor) -> None:
        check_shape(outputs, targets, "Gaussian")

    def impossible(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets.isfinite().logical_not()

    def _refusal(self, outputs: Tensor, value: Tensor) -> str:
        return NOT_FINITE

    def _variance(self, outputs: Tensor) -> Tensor:
        """The variances in a shape that broadcasts to the outputs."""
        if not isinstance(self.variance, tuple):
            # A tensor without dimensions adapts to the type and the device of the others.
            return torch.tensor(float(self.variance), dtype=torch.float64)
        variance = torch.tensor(self.variance, dtype=outputs.dtype, device=outputs.device)
        dim = self.channel_dim(outputs)
        if dim is None:
            return variance
        return variance.view([-1 if d == dim else 1 for d in range(outputs.dim())])


@dataclass(frozen=True)
class GaussianWithVariance(Likelihood):
    r"""Independent normal targets whose mean and variance are both outputs.

    The first half of the channels are the means :math:`\mu`, the second half the logarithms
    :math:`\lambda` of the variances: :math:`y_k \sim N(\mu_k, v_k)` with
    :math:`v_k = e^{\lambda_k}`.  Targets have half
    as many channels as the outputs.  The score of a pair is

    .. math:: \big( (y - \mu) e^{-\lambda}, \; \tfrac12 (y - \mu)^2 e^{-\lambda} - \tfrac12 \big)

    and its Fisher information :math:`\mathrm{diag}(e^{-\lambda}, \tfrac12)`.  The matching
    training loss is ``GaussianNLLLoss(full=True)`` with the variance :math:`e^\lambda`, summed over
    outputs and averaged over examples.
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`-\frac12 \sum_k (y_k - \mu_k)^2 / v_k + \log 2 \pi v_k`, ``[n]``."""
        mean, log_variance = self._halves(outputs)
        squares = (targets - mean).square() * (-log_variance).exp()
        return -0.5 * summed(squares + log_variance + LOG_TWO_PI)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""The score of the means, then of the log variances; the outputs' shape."""
        mean, log_variance = self._halves(outputs)
        gap, precision = targets.to(outputs.dtype) - mean, (-log_variance).exp()
        return self._joined(gap * precision, 0.5 * (gap.square() * precision - 1))

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`e^{-\lambda_k / 2} e_k` for the means, :math:`e_k / \sqrt 2` for the others.

        Returns:
            Shape ``[c, n, ...]`` for ``c`` outputs.
        """
        mean, log_variance = self._halves(outputs)
        return along_axes(
            self._joined((-log_variance / 2).exp(), torch.full_like(mean, math.sqrt(0.5)))
        )

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Targets by inversion of the normal distribution, ``[num_samples, n, ...]``."""
        mean, log_variance = self._halves(outputs)
        return mean + (log_variance / 2).exp() * _standard_normal(mean, num_samples, generator)

    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r"""The divergences in nats, shape ``[n]``.

        :math:`\frac12 \sum_k (e^{\lambda_k} + (\mu_k - \mu'_k)^2) e^{-\lambda'_k}
        + \lambda'_k - \lambda_k - 1`
        """
        mean, log_variance = self._halves(outputs)
        other_mean, other_log_variance = self._halves(other)
        change = log_variance - other_log_variance
        squares = (mean - other_mean).square() * (-other_log_variance).exp()
        return 0.5 * summed(change.expm1() - change + squares, weights)

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that every mean has a log variance.

        Raises:
            ValueError: the number of channels is odd, or there are none.
        """
        dim = self.channel_dim(outputs)
        if dim is None or outputs.shape[dim] % 2:
            raise ValueError(
                "Outputs must be means and log variances, an even number of channels, got outputs "
                f"of shape {list(outputs.shape)}."
            )

    def check_target_shape(self, outputs: Tensor, targets: Tensor) -> None:
        check_shape(self._halves(outputs)[0], targets, "Gaussian", "the means' shape")

    def impossible(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets.isfinite().logical_not()

    def _refusal(self, outputs: Tensor, value: Tensor) -> str:
        return NOT_FINITE

    def _halves(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The means and the log variances."""
        dim = self.channel_dim(outputs)
        assert dim is not None
        mean, log_variance = outputs.chunk(2, dim)
        return mean, log_variance

    def _joined(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """What :meth:`_halves` separates."""
        dim = self.channel_dim(mean)
        assert dim is not None
        return torch.cat([mean, log_variance], dim)


def _standard_normal(outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Normal noise of variance 1, ``[num_samples, *outputs.shape]``."""
    # ndtri(0) is -inf: the generator's smallest step above 0 takes its place.
    draws = uniform(outputs, num_samples, generator).clamp_min(2.0**-54)
    noise: Tensor = torch.special.ndtri(draws).transpose(0, 1).to(outputs)
    return noise
