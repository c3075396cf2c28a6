"""Outputs of yes or no."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ewc.likelihoods.entries import along_axes, check_shape, uniform
from ewc.likelihoods.likelihood import Likelihood, summed


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""Independent yes-or-no outputs (multi-label): :math:`p(y_k = 1 \mid f) = \sigma(f_k)`.

    Targets are 0 or 1, in the outputs' shape.  The score is :math:`y - \sigma(f)` and the Fisher
    information of the logits :math:`\mathrm{diag}(\sigma(f) \sigma(-f))`.  The matching
    training loss is the binary cross-entropy, summed over outputs.
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\sum_k y_k f_k - \log(1 + e^{f_k})` in nats, shape ``[n]``."""
        return summed(targets * outputs - functional.softplus(outputs))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`y_n - \sigma(f_n)`, the outputs' shape."""
        return targets.to(outputs.dtype) - outputs.sigmoid()

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`\sqrt{\sigma(f_k) \sigma(-f_k)}\, e_k` for every output, ``[c, n, ...]``."""
        return along_axes((outputs.sigmoid() * (-outputs).sigmoid()).sqrt())

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Targets 0 or 1, shape ``[num_samples, n, ...]``."""
        draws = uniform(outputs, num_samples, generator)
        probability = outputs.double().sigmoid()[:, None]
        return (draws.to(outputs.device) < probability).to(outputs.dtype).transpose(0, 1)

    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r""":math:`\sum_k p_k \log \frac{p_k}{q_k} + (1 - p_k) \log \frac{1 - p_k}{1 - q_k}`."""
        yes = outputs.sigmoid() * (functional.logsigmoid(outputs) - functional.logsigmoid(other))
        no = (-outputs).sigmoid() * (
            functional.logsigmoid(-outputs) - functional.logsigmoid(-other)
        )
        return summed(yes + no, weights)

    def check_target_shape(self, outputs: Tensor, targets: Tensor) -> None:
        check_shape(outputs, targets, "Bernoulli")

    def impossible(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets != 0) & (targets != 1)

    def _refusal(self, outputs: Tensor, value: Tensor) -> str:
        return f"Targets of the Bernoulli likelihood must be 0 or 1, got {value}."
