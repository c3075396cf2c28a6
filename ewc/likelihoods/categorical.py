"""One class of several: the softmax likelihood."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.likelihoods.likelihood import Likelihood


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

    def check_outputs(self, outputs: Tensor) -> None:
        if outputs.dim() == 2:
            return
        fix = ""
        if outputs.dim() == 1:
            fix = "; for one output per example with labels 0 and 1, take Bernoulli()"
        raise ValueError(
            "Outputs of the categorical likelihood must have shape [n, c], got "
            f"{list(outputs.shape)}{fix}."
        )

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
