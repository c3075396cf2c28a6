r"""Classes whose Fisher information has a floor where the network is certain."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.checks import check_share
from ewc.likelihoods.categorical import Categorical


@dataclass(frozen=True)
class SmoothedCategorical(Categorical):
    r"""One of ``c`` classes, with the information taken at smoothed probabilities.

    A network that has fitted its training data gives nearly every label a probability near 1.
    The Fisher information of the logits, :math:`\mathrm{diag}(p) - p p^\top`, then nearly
    vanishes.  Its size says how long the network was trained, not how much its outputs matter.
    Here the information is :math:`\mathrm{diag}(\tilde p) - \tilde p \tilde p^\top` with

    .. math:: \tilde p = (1 - \epsilon) \, p + \epsilon / c ,

    that of a network with smoothed labels (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    The densities are those of :class:`~ewc.Categorical`.  The score is :math:`e_y - \tilde p`,
    whose covariance under :math:`\tilde p` is this information; it is not the gradient of the
    log-density.  With :class:`~ewc.Empirical`, which takes the observed labels, the information
    of a certain network still shrinks to the order of :math:`\epsilon^2`.

    Attributes:
        smoothing: :math:`\epsilon`, from 0 (the Fisher information itself) to 1.

    Raises:
        ValueError: ``smoothing`` is outside [0, 1].
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check the attributes."""
        super().__post_init__()
        check_share(self.smoothing, "smoothing")

    def smoothed(self, outputs: Tensor) -> Tensor:
        r"""Logits of :math:`\tilde p`, the outputs' shape."""
        dim = self.channel_dim(outputs)
        uniform = torch.full_like(outputs, self.smoothing / outputs.shape[dim]).log()
        remaining = torch.tensor(1 - self.smoothing, dtype=outputs.dtype).log()
        return torch.logaddexp(outputs.log_softmax(dim) + remaining.to(outputs.device), uniform)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`e_{y_n} - \tilde p_n`, the outputs' shape."""
        return super().score(self.smoothed(outputs), targets)

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r"""The exact factor of :math:`\mathrm{diag}(\tilde p) - \tilde p \tilde p^\top`."""
        return super().fisher_factor(self.smoothed(outputs))

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        r"""Class indices drawn from :math:`\tilde p`, ``[num_samples, n, ...]``."""
        return super().sample(self.smoothed(outputs), num_samples, generator)
