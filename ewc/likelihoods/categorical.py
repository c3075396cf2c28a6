"""One class of several: the softmax likelihood."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ewc.checks import check_instance, check_not_negative, check_whole
from ewc.likelihoods.likelihood import Likelihood, summed

SUM_MARGIN = 1e-2
"""The largest deviation from 1 of the sum of soft labels, which may be in half precision."""

CLASSES_AT_ONCE = 512
"""The number of classes whose cumulative distribution is computed in double precision."""


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    r"""One of ``c`` classes: :math:`p(y = k \mid f) = \mathrm{softmax}(f)_k`.

    Outputs are logits ``[n, c]``, ``[n, t, c]`` (tokens) or ``[n, c, h, w]`` (pixels).  Targets
    are class indices, ``[n]``, ``[n, t]`` or ``[n, h, w]``.  The log-likelihood of an example is
    the sum over its positions.  The score of a position is :math:`e_y - p` and the Fisher
    information of its logits :math:`\mathrm{diag}(p) - p p^\top`.

    Soft labels are floating-point targets of the outputs' shape: probabilities :math:`q` of the
    classes, with the score :math:`q - p` and the log-likelihood :math:`\sum_k q_k \log p_k`.

    Attributes:
        ignore_index: the label of positions that do not count.
        class_dim: the dimension of the classes.  ``None`` means the last one, or dimension 1 for
            four and more dimensions.  It is 1 for outputs ``[n, c, t]``.
        class_weights: how often an observation counts, by its observed class; ``None`` for once.
        next_token: whether the logits of a position predict the label of the next one, as for a
            causal language model whose labels are its input.  The last position does not count.
            Weights that come with the data belong to the labels, and move with them.

    Raises:
        ValueError: an attribute has an impossible value.
        TypeError: ``next_token`` is not a truth value.
    """

    ignore_index: int = -100
    class_dim: int | None = None
    class_weights: tuple[float, ...] | None = None
    next_token: bool = False

    def __post_init__(self) -> None:
        """Check the attributes."""
        check_whole(self.ignore_index, "ignore_index")
        if self.class_dim is not None:
            check_whole(self.class_dim, "class_dim")
            if self.class_dim == 0:
                raise ValueError("class_dim must not be 0, the dimension of the examples.")
        if self.class_weights is not None:
            if not isinstance(self.class_weights, tuple):
                raise ValueError(
                    "class_weights must be a tuple of numbers, or None, got "
                    f"{self.class_weights!r}; for a tensor w, give tuple(w.tolist())."
                )
            for weight in self.class_weights:
                check_not_negative(weight, "a class weight")
        check_instance(self.next_token, bool, "next_token", "True or False")

    def channel_dim(self, outputs: Tensor) -> int:
        dim = self.class_dim if self.class_dim is not None else super().channel_dim(outputs)
        assert dim is not None
        return dim % outputs.dim()

    def needs_targets(self, outputs: Tensor) -> bool:
        return outputs.dim() > 2 or self.class_weights is not None

    def moved_weights(self, weights: Tensor) -> Tensor:
        # The last position has no label, so its weight does not matter.
        return weights.roll(-1, 1) if self.next_token and weights.dim() > 1 else weights

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """1, or the weight of the observed class; 0 where the target is ``ignore_index``.

        Targets that are no class indices have no weights.
        """
        if targets.is_floating_point() or targets.shape != self._positions(outputs):
            return None
        labels = self._observed(targets)
        counted = labels != self.ignore_index
        if self.class_weights is None:
            return counted.to(outputs.dtype)
        by_class = torch.tensor(self.class_weights, dtype=outputs.dtype, device=outputs.device)
        return by_class[labels.where(counted, 0)] * counted

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`\sum_t w_t (f_{t y_t} - \log \sum_k e^{f_{tk}})` in nats, shape ``[n]``."""
        dim = self.channel_dim(outputs)
        log_p = outputs.log_softmax(dim)
        if targets.is_floating_point():
            return summed(torch.where(targets == 0, 0, targets * log_p))
        labels = self._observed(targets)
        counted = labels != self.ignore_index
        index = labels.where(counted, 0)
        observed = log_p.gather(dim, index.unsqueeze(dim)).squeeze(dim)
        weights = self.weights(outputs, targets)
        return summed(observed.where(counted, 0), weights)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r""":math:`e_{y_n} - p_n`, or :math:`q_n - p_n` for soft labels; the outputs' shape."""
        dim = self.channel_dim(outputs)
        if targets.is_floating_point():
            return targets.to(outputs.dtype) - outputs.softmax(dim)
        labels = self._observed(targets)
        index = labels.where(labels != self.ignore_index, 0).unsqueeze(dim)
        score = outputs.softmax(dim).neg()
        return score.scatter_add_(dim, index, score.new_ones(()).expand(index.shape))

    def fisher_factor(self, outputs: Tensor) -> Tensor:
        r"""The exact factor of :math:`\mathrm{diag}(p) - p p^\top`, ``c - 1`` vectors a position.

        The matrix has rank :math:`c - 1`, and its Cholesky factor has a closed form: with
        the tail sums :math:`t_j = \sum_{i \ge j} p_i`, vector :math:`j < c - 1` is
        :math:`\sqrt{p_j t_{j+1} / t_j}\,(e_j - \sum_{i > j} p_i / t_{j+1}\, e_i)`.
        No difference :math:`1 - p` is ever taken, so a saturated softmax loses no digits.
        There is one backward pass less than there are classes.

        Returns:
            Shape ``[c - 1, n, c]``.  With ``t`` positions ``[t (c - 1), *outputs.shape]``, each
            vector with one position that is not 0.
        """
        dim = self.channel_dim(outputs)
        probability = outputs.softmax(dim).movedim(dim, -1)
        positions = probability.shape[1:-1]
        n, t, c = len(outputs), positions.numel(), probability.shape[-1]
        factor = _factor(probability.reshape(n, t, c))
        if outputs.dim() == 2:
            return factor[:, 0].transpose(0, 1).contiguous()
        vectors = factor.new_zeros(t, c - 1, n, t, c)
        vectors.diagonal(dim1=0, dim2=3).copy_(factor.permute(2, 0, 3, 1))
        return vectors.view(t * (c - 1), n, *positions, c).movedim(-1, dim + 1)

    def sample(self, outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
        """Class indices by inversion of the cumulative distribution, ``[num_samples, n, ...]``."""
        positions = self._positions(outputs)
        shape = positions[0], num_samples, *positions[1:]
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        uniform = uniform.movedim(1, -1).contiguous().to(outputs.device)
        drawn = _inverted(outputs.movedim(self.channel_dim(outputs), -1), uniform)
        labels = drawn.movedim(-1, 0).contiguous()
        # What a position draws is the label of the next one.
        return labels.roll(1, -1) if self.next_token else labels

    def kl(self, outputs: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
        r""":math:`\sum_t w_t \sum_k p_{tk} (\log p_{tk} - \log q_{tk})` in nats, shape ``[n]``."""
        dim = self.channel_dim(outputs)
        log_p, log_q = outputs.log_softmax(dim), other.log_softmax(dim)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim, keepdim=True)
        return summed(divergence, weights)

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that there are classes.

        Raises:
            ValueError: there is no dimension of classes, or it does not fit the attributes.

        Warns:
            UserWarning: there is one class.
        """
        shape = list(outputs.shape)
        if outputs.dim() < 2:
            raise ValueError(
                f"Outputs of shape {shape} have no classes, as the categorical likelihood needs "
                "them ([n, c], [n, t, c] or [n, c, h, w]); for one output per example with labels "
                "0 and 1, take Bernoulli()."
            )
        if self.class_dim is not None and not (
            -outputs.dim() < self.class_dim < outputs.dim() and self.class_dim
        ):
            raise ValueError(f"class_dim={self.class_dim} is no dimension of outputs {shape}.")
        if self.next_token and outputs.dim() != 3:
            raise ValueError(
                f"next_token=True needs outputs of tokens, of shape [n, t, c], got {shape}."
            )
        classes = outputs.shape[self.channel_dim(outputs)]
        if classes == 1:
            warnings.warn(
                f"Outputs of shape {shape} have one class, which is certain: the Fisher "
                "information is 0. For one output of another kind take Gaussian() or Bernoulli().",
                stacklevel=2,
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(
                f"class_weights must have one weight for each of the {classes} classes, got "
                f"{len(self.class_weights)}."
            )

    def check_target_shape(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point() and targets.shape == outputs.shape and outputs.dim():
            if self.class_weights is not None or self.next_token:
                name = "next_token" if self.next_token else "class_weights"
                raise ValueError(
                    f"{name} needs class indices as targets, got soft labels {list(targets.shape)}."
                )
            return
        expected = list(self._positions(outputs))
        if list(targets.shape) != expected or targets.is_floating_point():
            fix = self._way_out(outputs, targets)
            raise ValueError(
                f"Targets of the categorical likelihood must be class indices, integers of shape "
                f"{expected}, got {targets.dtype} of shape {list(targets.shape)}{fix}."
            )

    def impossible(self, outputs: Tensor, targets: Tensor) -> Tensor:
        dim = self.channel_dim(outputs)
        if targets.is_floating_point():
            sums = targets.sum(dim, keepdim=True)
            return ((targets >= 0) & ((sums - 1).abs() <= SUM_MARGIN)).logical_not()
        targets = targets.long()  # bytes have no -100
        outside = (targets < 0) | (targets >= outputs.shape[dim])
        return outside & (targets != self.ignore_index)

    def _refusal(self, outputs: Tensor, value: Tensor) -> str:
        if value.is_floating_point():
            return (
                "Soft labels must be probabilities, 0 or above with a sum of 1 over the classes; "
                "for independent labels of yes or no, take Bernoulli()."
            )
        classes = outputs.shape[self.channel_dim(outputs)]
        fix = "; for one output with labels 0 and 1, take Bernoulli() and y[:, None]"
        allowed = f"0 to {classes - 1}" if classes > 1 else f"labels of 0{fix}"
        return (
            f"Label {int(value)} is outside the model's {classes} output{'s' * (classes > 1)}: "
            f"allowed are {allowed}, and ignore_index={self.ignore_index} for what does not count."
        )

    def _way_out(self, outputs: Tensor, targets: Tensor) -> str:
        """How targets of the wrong shape become class indices, as part of a message."""
        dim, shape, given = self.channel_dim(outputs), list(outputs.shape), list(targets.shape)
        expected = list(self._positions(outputs))
        if given == [*expected, 1]:
            place = ", ".join([":"] * len(expected) + ["0"])
            return f"; for a column of labels, give y[{place}].long()"
        if given == [expected[0], 1, *expected[1:]]:
            return "; for labels with a channel, give y[:, 0].long()"
        if given == shape:
            return f"; for one-hot rows, give y.argmax({dim})"
        if given == expected:
            return "; for whole numbers, give y.long()"
        for other in (1, -1):
            if given == [n for d, n in enumerate(shape) if d != other % len(shape)]:
                return f"; for classes in dimension {other}, take Categorical(class_dim={other})"
        return ""

    def _positions(self, outputs: Tensor) -> torch.Size:
        """The shape of class indices, ``[n, *positions]``."""
        dim = self.channel_dim(outputs)
        return outputs.shape[:dim] + outputs.shape[dim + 1 :]

    def _observed(self, targets: Tensor) -> Tensor:
        """The label that each position predicts, ``[n, *positions]``."""
        targets = targets.long()  # bytes have no -100
        if not self.next_token:
            return targets
        last = torch.full_like(targets[:, :1], self.ignore_index)
        return torch.cat([targets[:, 1:], last], 1)


def _factor(probability: Tensor) -> Tensor:
    """The Cholesky factors of probabilities ``[..., c]``, ``[..., c - 1, c]``."""
    tiny = torch.finfo(probability.dtype).tiny
    tail = probability.flip(-1).cumsum(-1).flip(-1)
    rest = tail[..., 1:].clamp_min(tiny)
    pivot = (probability[..., :-1] * (rest / tail[..., :-1].clamp_min(tiny))).sqrt()
    # column[..., j, i] = -p_i / t_{j+1} for i > j, 1 for i = j, 0 above.
    column = torch.triu(-(probability[..., None, :] / rest[..., :, None]), diagonal=1)
    column.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return pivot[..., :, None] * column


def _inverted(logits: Tensor, uniform: Tensor) -> Tensor:
    """Classes drawn by inversion of the cumulative distribution.

    Many classes are drawn in two steps, a block of them and one of the block.  A double precision
    copy of all probabilities is then never made.

    Args:
        logits: ``[..., c]``.
        uniform: random numbers ``[..., s]`` in double precision.

    Returns:
        Shape ``[..., s]``.
    """
    classes = logits.shape[-1]
    if classes <= CLASSES_AT_ONCE:
        cumulative = logits.double().softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, uniform, right=True).clamp_max(classes - 1)
    probability = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    width = int(classes**0.5)
    padded = torch.nn.functional.pad(probability, (0, -classes % width))
    blocks = padded.view(*padded.shape[:-1], -1, width)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # The probabilities are rounded, so their sum is not quite 1.
    mass = uniform * cumulative[..., -1:]
    block = torch.searchsorted(cumulative, mass, right=True).clamp_max(blocks.shape[-2] - 1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, width)).double().cumsum(-1)
    place = torch.searchsorted(inside, (mass - before)[..., None], right=True)[..., 0]
    return (block * width + place.clamp_max(width - 1)).clamp_max(classes - 1)
