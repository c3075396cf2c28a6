r"""Likelihoods :math:`p(y \mid f)`: what a network's outputs mean.

The Fisher information of a network needs two things of a likelihood.  The *score* is
:math:`s(y) = \partial \log p(y \mid f) / \partial f`.  The score vectors have outer products
that sum to the Fisher information of the outputs,
:math:`E_{y \sim p(\cdot \mid f)}[s(y) s(y)^\top]`.

Outputs ``f`` have shape ``[n, c]``: ``n`` examples, ``c`` outputs.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ewc.checks import check_instance, check_positive


class Likelihood(ABC):
    r"""The density :math:`p(y \mid f)` of a target given a network's outputs."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\log p(y_n \mid f_n)` in nats, shape ``[n]``."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`s_n = \partial \log p(y_n \mid f_n) / \partial f_n`, shape ``[n, c]``."""

    @abstractmethod
    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r"""Vectors :math:`s_{kn}` with :math:`\sum_k s_{kn} s_{kn}^\top = E_y[s s^\top]`.

        Returns:
            Shape ``[k, n, c]``, with as few vectors as the rank of the matrix allows.
        """

    @abstractmethod
    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        r"""Targets drawn from :math:`p(\cdot \mid f_n)`, shape ``[num_samples, n, ...]``.

        Random numbers are drawn example by example from ``generator``, a CPU generator.
        Other batches of the same data therefore draw the same targets.
        """

    @abstractmethod
    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        r""":math:`KL(p(\cdot \mid f_n) \| p(\cdot \mid f'_n))` in nats, shape ``[n]``."""

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that ``targets`` can belong to ``outputs``.

        Raises:
            ValueError: the targets have the wrong shape, or an impossible value.
        """


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""One of ``c`` classes: :math:`p(y = k \mid f) = \mathrm{softmax}(f)_k`.

    Targets are class indices, shape ``[n]``.  The score is
    :math:`e_y - p` and the Fisher information of the logits :math:`\mathrm{diag}(p) - p p^\top`.
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`f_{n y_n} - \log \sum_k e^{f_{nk}}` in nats, shape ``[n]``."""
        return outputs.log_softmax(1).gather(1, targets.long()[:, None])[:, 0]

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`e_{y_n} - p_n`, shape ``[n, c]``."""
        score = -outputs.softmax(1)
        index = targets.long()[:, None]
        return score.scatter_add(1, index, torch.ones_like(score[:, :1]))

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r"""The exact factor of :math:`\mathrm{diag}(p) - p p^\top` in ``c - 1`` vectors.

        The matrix has rank :math:`c - 1`, and its Cholesky factor has a closed form: with
        the tail sums :math:`t_j = \sum_{i \ge j} p_i`, vector :math:`j < c - 1` is
        :math:`\sqrt{p_j t_{j+1} / t_j}\,(e_j - \sum_{i > j} p_i / t_{j+1}\, e_i)`.
        No difference :math:`1 - p` is ever taken, so a saturated softmax loses no digits.
        There is one backward pass less than there are classes.

        Returns:
            Shape ``[c - 1, n, c]``.
        """
        probability = outputs.softmax(1)
        classes = probability.shape[1]
        tiny = torch.finfo(probability.dtype).tiny
        tail = probability.flip(1).cumsum(1).flip(1)
        rest = tail[:, 1:].clamp_min(tiny)
        pivot = (probability[:, :-1] * (rest / tail[:, :-1].clamp_min(tiny))).sqrt()
        # column[n, j, i] = -p_i / t_{j+1} for i > j, 1 for i = j, 0 above.
        column = torch.triu(-(probability[:, None, :] / rest[:, :, None]), diagonal=1)
        column.diagonal(dim1=1, dim2=2).fill_(1.0)
        factor = (pivot[:, :, None] * column).transpose(0, 1)
        assert factor.shape[0] == classes - 1
        return factor.contiguous()

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Class indices by inversion of the cumulative distribution, ``[num_samples, n]``."""
        uniform = torch.rand(
            outputs.shape[0], num_samples, generator=generator, dtype=torch.float64
        )
        cumulative = outputs.double().softmax(1).cumsum(1)
        index = torch.searchsorted(cumulative, uniform.to(outputs.device), right=True)
        return index.clamp_max(outputs.shape[1] - 1).T.contiguous()

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        r""":math:`\sum_k p_k (\log p_k - \log q_k)` in nats, shape ``[n]``."""
        log_p, log_q = outputs.log_softmax(1), other.log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are class indices ``[n]`` between 0 and ``c - 1``.

        Raises:
            ValueError: the targets have another shape, or a label lies outside the outputs.
        """
        n, classes = outputs.shape
        if targets.shape != (n,) or targets.is_floating_point():
            fix = ""
            if targets.shape == (n, 1):
                fix = "; for a column of labels, give y[:, 0].long()"
            elif targets.shape == (n, classes):
                fix = "; for one-hot rows, give y.argmax(1)"
            elif targets.shape == (n,):
                fix = "; for whole numbers, give y.long()"
            raise ValueError(
                f"Targets of the categorical likelihood must be class indices, integers of shape "
                f"[{n}], got {targets.dtype} of shape {list(targets.shape)}{fix}."
            )
        if n and (outside := targets[(targets < 0) | (targets >= classes)]).numel():
            fix = "; for one output with labels 0 and 1, take Bernoulli() and y[:, None]"
            raise ValueError(
                f"Label {int(outside[0])} is outside the model's {classes} "
                f"output{'s' * (classes > 1)}: allowed are "
                + (f"0 to {classes - 1}." if classes > 1 else f"labels of 0{fix}.")
            )


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Independent outputs of known variance: :math:`y \sim N(f, \sigma^2 I)`.

    Targets have the shape of the outputs, ``[n, c]``.  The score is
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
        squares = (targets - outputs).square().sum(1) / self.variance
        return -0.5 * (squares + outputs.shape[1] * math.log(2 * math.pi * self.variance))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`(y_n - f_n) / \sigma^2`, shape ``[n, c]``."""
        return (targets.to(outputs.dtype) - outputs) / self.variance

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`e_k / \sigma` for every output, shape ``[c, n, c]``."""
        return _along_axes(torch.full_like(outputs, 1 / math.sqrt(self.variance)))

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Targets by inversion of the normal distribution, ``[num_samples, n, c]``."""
        n, c = outputs.shape
        uniform = torch.rand(n, num_samples, c, generator=generator, dtype=torch.float64)
        # ndtri(0) is -inf: the generator's smallest step above 0 takes its place.
        noise = torch.special.ndtri(uniform.clamp_min(2.0**-54)).transpose(0, 1)
        targets: Tensor = outputs + math.sqrt(self.variance) * noise.to(outputs)
        return targets

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        r""":math:`\|f_n - f'_n\|^2 / (2 \sigma^2)` in nats, shape ``[n]``."""
        return (outputs - other).square().sum(1) / (2 * self.variance)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are finite and have the outputs' shape.

        Raises:
            ValueError: the targets have another shape, or one is not finite.
        """
        _check_shape(outputs, targets, "Gaussian")
        if not bool(targets.isfinite().all()):
            raise ValueError("Targets of the Gaussian likelihood must be finite.")


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""Independent yes-or-no outputs (multi-label): :math:`p(y_k = 1 \mid f) = \sigma(f_k)`.

    Targets are 0 or 1, shape ``[n, c]``.  The score is :math:`y - \sigma(f)` and the Fisher
    information of the logits :math:`\mathrm{diag}(\sigma(f) \sigma(-f))`.  The matching
    training loss is the binary cross-entropy, summed over outputs.
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\sum_k y_k f_k - \log(1 + e^{f_k})` in nats, shape ``[n]``."""
        return (targets * outputs - functional.softplus(outputs)).sum(1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`y_n - \sigma(f_n)`, shape ``[n, c]``."""
        return targets.to(outputs.dtype) - outputs.sigmoid()

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`\sqrt{\sigma(f_k) \sigma(-f_k)}\, e_k` for every output, ``[c, n, c]``."""
        return _along_axes((outputs.sigmoid() * (-outputs).sigmoid()).sqrt())

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Targets 0 or 1, shape ``[num_samples, n, c]``."""
        n, c = outputs.shape
        uniform = torch.rand(n, num_samples, c, generator=generator, dtype=torch.float64)
        probability = outputs.double().sigmoid()[:, None]
        return (uniform.to(outputs.device) < probability).to(outputs.dtype).transpose(0, 1)

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        r""":math:`\sum_k p_k \log \frac{p_k}{q_k} + (1 - p_k) \log \frac{1 - p_k}{1 - q_k}`."""
        yes = outputs.sigmoid() * (functional.logsigmoid(outputs) - functional.logsigmoid(other))
        no = (-outputs).sigmoid() * (
            functional.logsigmoid(-outputs) - functional.logsigmoid(-other)
        )
        return (yes + no).sum(1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are 0 or 1 and have the outputs' shape.

        Raises:
            ValueError: the targets have another shape, or one is neither 0 nor 1.
        """
        _check_shape(outputs, targets, "Bernoulli")
        if (odd := targets[(targets != 0) & (targets != 1)]).numel():
            raise ValueError(f"Targets of the Bernoulli likelihood must be 0 or 1, got {odd[0]}.")


@dataclass(frozen=True)
class Poisson(Likelihood):
    r"""Independent counts: :math:`y_k \sim \mathrm{Poisson}(e^{f_k})`, outputs are log-rates.

    Targets are whole numbers from 0 on, shape ``[n, c]``.  The score is :math:`y - e^f` and
    the Fisher information of the outputs :math:`\mathrm{diag}(e^f)`.  The matching training
    loss is ``PoissonNLLLoss(log_input=True)``, summed over outputs.
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\sum_k y_k f_k - e^{f_k} - \log y_k!` in nats, shape ``[n]``."""
        targets = targets.to(outputs.dtype)
        return (targets * outputs - outputs.exp() - torch.lgamma(targets + 1)).sum(1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`y_n - e^{f_n}`, shape ``[n, c]``."""
        return targets.to(outputs.dtype) - outputs.exp()

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r""":math:`e^{f_k / 2}\, e_k` for every output, shape ``[c, n, c]``."""
        return _along_axes((outputs / 2).exp())

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Counts, shape ``[num_samples, n, c]``."""
        rates = outputs.double().exp().cpu()[:, None].repeat(1, num_samples, 1)
        return torch.poisson(rates, generator).transpose(0, 1).to(outputs)

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        r""":math:`\sum_k e^{f_k} (f_k - f'_k) - e^{f_k} + e^{f'_k}` in nats, shape ``[n]``."""
        return (outputs.exp() * (outputs - other) - outputs.exp() + other.exp()).sum(1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are counts and have the outputs' shape.

        Raises:
            ValueError: the targets have another shape, or one is not a whole number from 0 on.
        """
        _check_shape(outputs, targets, "Poisson")
        fits = (targets >= 0) & targets.isfinite()
        if targets.is_floating_point():
            fits &= targets == targets.floor()
        if (odd := targets[~fits]).numel():
            raise ValueError(
                f"Targets of the Poisson likelihood must be whole numbers from 0 on, got {odd[0]}."
            )


def _check_shape(outputs: Tensor, targets: Tensor, name: str) -> None:
    """Check for targets of the outputs' shape ``[n, c]``."""
    if targets.shape == outputs.shape:
        return
    fix = ""
    if [*targets.shape, 1] == list(outputs.shape):
        fix = "; give y[:, None]"
    raise ValueError(
        f"Targets of the {name} likelihood must have the outputs' shape {list(outputs.shape)}, "
        f"got {list(targets.shape)}{fix}."
    )


def _along_axes(lengths: Tensor) -> Tensor:
    """One vector an output, along its axis: ``[n, c]`` as ``[c, n, c]``."""
    return torch.diag_embed(lengths).transpose(0, 1)


def check_likelihood(value: Likelihood) -> None:
    """Check that an argument is a :class:`Likelihood`.

    Raises:
        TypeError: the argument is of another type.
    """
    check_instance(value, Likelihood, "likelihood", "a Likelihood instance such as Categorical()")
