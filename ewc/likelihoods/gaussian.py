"""Real-valued outputs with normal noise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.checks import check_positive
from ewc.likelihoods.entries import along_axes, check_shape, uniform
from ewc.likelihoods.likelihood import Likelihood, summed


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Independent outputs of known variance: :math:`y \sim N(f, \sigma^2 I)`.

    Targets have the shape of the outputs, whatever it is.  The score is
    :math:`(y - f) / \sigma^2` and the Fisher information of the outputs :math:`I / \sigma^2`.
    The matching training loss is :math:`\|y - f\|^2 / (2 \sigma^2)`, summed over outputs and
    averaged over examples.

    Attributes:
        variance: :math:`\sigma^2`, in the squared unit of the targets.

    Raises:
        ValueError: the variance is not a finite number above 0.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.variance, "variance")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`-\|y - f\|^2 / (2 \sigma^2) - \frac{c}{2} \log 2 \pi \sigma^2`, ``[n]``."""
        squares = summed((targets - outputs).square()) / self.variance
        c = outputs.shape[1:].numel()
        return -0.5 * (squares + c * math.log(2 * math.pi * self.variance))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`(y_n - f_n) / \sigma^2`, the outputs' shape."""
        return (targets.to(outputs.dtype) - outputs) / self.variance

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`e_k / \sigma` for each of the ``c`` outputs, ``[c, n, ...]``."""
        return along_axes(torch.full_like(outputs, 1 / math.sqrt(self.variance)))

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Targets by inversion of the normal distribution, ``[num_samples, n, ...]``."""
        draws = uniform(outputs, num_samples, generator)
        # ndtri(0) is -inf: the generator's smallest step above 0 takes its place.
        noise = torch.special.ndtri(draws.clamp_min(2.0**-54)).transpose(0, 1)
        targets: Tensor = outputs + math.sqrt(self.variance) * noise.to(outputs)
        return targets

    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r""":math:`\|f_n - f'_n\|^2 / (2 \sigma^2)` in nats, shape ``[n]``."""
        return summed((outputs - other).square() / (2 * self.variance), weights)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are finite and have the outputs' shape.

        Raises:
            ValueError: the targets have another shape, or one is not finite.
        """
        check_shape(outputs, targets, "Gaussian")
        if not bool(targets.isfinite().all()):
            raise ValueError("Targets of the Gaussian likelihood must be finite.")
