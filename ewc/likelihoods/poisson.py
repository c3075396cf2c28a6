"""Counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.likelihoods.entries import along_axes, check_shape
from ewc.likelihoods.likelihood import Likelihood, summed


@dataclass(frozen=True)
class Poisson(Likelihood):
    r"""Independent counts: :math:`y_k \sim \mathrm{Poisson}(e^{f_k})`, outputs are log-rates.

    Targets are whole numbers from 0 on, in the outputs' shape.  The score is :math:`y - e^f` and
    the Fisher information of the outputs :math:`\mathrm{diag}(e^f)`.  The matching training
    loss is ``PoissonNLLLoss(log_input=True)``, summed over outputs.
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\sum_k y_k f_k - e^{f_k} - \log y_k!` in nats, shape ``[n]``."""
        targets = targets.to(outputs.dtype)
        return summed(targets * outputs - outputs.exp() - torch.lgamma(targets + 1))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`y_n - e^{f_n}`, the outputs' shape."""
        return targets.to(outputs.dtype) - outputs.exp()

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`e^{f_k / 2}\, e_k` for each of the ``c`` outputs, ``[c, n, ...]``."""
        return along_axes((outputs / 2).exp())

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Counts, shape ``[num_samples, n, ...]``."""
        rates = outputs.double().exp().cpu()[:, None]
        # torch refuses NaN; the outputs are checked with the scores.
        rates = rates.nan_to_num_().expand(-1, num_samples, *outputs.shape[1:]).contiguous()
        return torch.poisson(rates, generator).transpose(0, 1).to(outputs)

    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r""":math:`\sum_k e^{f_k} (f_k - f'_k) - e^{f_k} + e^{f'_k}` in nats, shape ``[n]``."""
        return summed(outputs.exp() * (outputs - other) - outputs.exp() + other.exp(), weights)

    def check_target_shape(self, outputs: Tensor, targets: Tensor) -> None:
        check_shape(outputs, targets, "Poisson")

    def impossible(self, outputs: Tensor, targets: Tensor) -> Tensor:
        fits = (targets >= 0) & targets.isfinite()
        if targets.is_floating_point():
            fits &= targets == targets.floor()
        return fits.logical_not()

    def _refusal(self, outputs: Tensor, value: Tensor) -> str:
        return f"Targets of the Poisson likelihood must be whole numbers from 0 on, got {value}."
