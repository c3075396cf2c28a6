"""Pseudo-rehearsal: the old outputs are held on images drawn from each class's moments."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from ewc import Categorical
from ewc.checks import check_count
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Strategy

DRAWS_PER_STEP = 16
"""The draws of a class for one batch of pseudo-images; each reads the factor of its class."""


@dataclass(frozen=True)
class PseudoRehearsal(Strategy):
    """Pseudo-rehearsal (Robins 1995) on images drawn from a Gaussian for each old class.

    Attributes:
        rank: the principal components that are kept of a class's images.
        batch_size: the pseudo-images in a training step.

    Raises:
        ValueError: a count is below 1.
    """

    rank: int = 50
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Check the counts."""
        check_count(self.rank, "rank")
        check_count(self.batch_size, "batch_size")

    def plugins(self, fisher: Fisher) -> list[SupervisedPlugin]:
        """The plugin, which does not use ``fisher``."""
        return [PseudoRehearsalPlugin(self.rank, self.batch_size)]


class ClassGaussians:
    r"""A Gaussian for the images of each class of each task: sums over images, no image.

    A pseudo-image is :math:`m + \sum_i z_i \sqrt{\lambda_i} v_i` with :math:`z \sim N(0, I)`.
    :math:`m` is the mean of the class, and :math:`\lambda_i`, :math:`v_i` are the leading
    eigenvalues and eigenvectors of its covariance.  Pixels are not cut to the range of images,
    which would shift the mean.

    Attributes:
        means: ``[g, pixels]``.
        factors: the rows :math:`\sqrt{\lambda_i} v_i`, ``[g, rank, pixels]``.
        counts: the images of every class, ``[g]``.
        tasks: the task label of every class, -1 where the task is not known, ``[g]``.
    """

    def __init__(self, means: Tensor, factors: Tensor, counts: Tensor, tasks: Tensor) -> None:
        self.means = means
        self.factors = factors
        self.counts = counts
        self.tasks = tasks

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, rank: int, task: int | None) -> "ClassGaussians":
        """The Gaussians of one task.

        Args:
            images: ``[n, pixels]``.
            labels: ``[n]``.
            rank: the eigenvectors that are kept, of at most as many as there are pixels.
            task: the task label, if the task is known.
        """
        means, factors, counts = [], [], []
        for label in torch.unique(labels):
            of_class = images[labels == label]
            means.append(of_class.mean(0))
            factors.append(_principal_components(of_class - means[-1], rank))
            counts.append(len(of_class))
        return cls(
            torch.stack(means),
            torch.stack(factors),
            torch.tensor(counts, device=images.device),
            torch.full((len(counts),), -1 if task is None else task, device=images.device),
        )

    def __add__(self, other: "ClassGaussians") -> "ClassGaussians":
        """The Gaussians of both."""
        return ClassGaussians(
            torch.cat([self.means, other.means]),
            torch.cat([self.factors, other.factors]),
            torch.cat([self.counts, other.counts]),
            torch.cat([self.tasks, other.tasks]),
        )

    def draw(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Pseudo-images ``[n, pixels]``, and their task labels ``[n]``.

        They come from :data:`DRAWS_PER_STEP` draws of a class by systematic sampling: the expected
        share of a class is in proportion to its count.  Every draw has the same number of images,
        so ``n`` is ``num_images`` rounded up to a multiple of the draws.
        """
        device = self.means.device
        draws = min(DRAWS_PER_STEP, num_images)
        ends = self.counts.cumsum(0)
        positions = (torch.arange(draws, device=device) + torch.rand((), device=device)) / draws
        chosen = torch.searchsorted(ends, positions * ends[-1], right=True)
        chosen = chosen.clamp_max(len(ends) - 1)  # a position may round up to the end
        shape = draws, -(-num_images // draws), self.factors.shape[1]
        noise = torch.randn(shape, dtype=self.means.dtype, device=device)
        images = torch.baddbmm(self.means[chosen, None], noise, self.factors[chosen])
        return images.flatten(0, 1), self.tasks[chosen].repeat_interleave(shape[1])

    def state(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(vars(self))


def _principal_components(deviations: Tensor, rank: int) -> Tensor:
    r"""The rows :math:`\sqrt{\lambda_i} v_i` of the covariance, ``[min(rank, pixels), pixels]``.

    There are fewer rows that are not 0 where there are fewer images.
    """
    num_images, num_pixels = deviations.shape
    rank = min(rank, num_pixels)
    # Pixels that are nearly always 0 give covariances on which eigh fails in single precision.
    if num_images < num_pixels:
        _left, values, vectors = torch.linalg.svd(deviations.double(), full_matrices=False)
        rows: Tensor = values[:rank, None] / num_images**0.5 * vectors[:rank]
        rows = nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))
    else:
        covariance = deviations.T @ deviations / num_images
        eigenvalues, columns = torch.linalg.eigh(covariance.double())
        rows = (columns[:, -rank:] * eigenvalues[-rank:].clamp_min(0).sqrt()).T
    return rows.to(deviations)


class PseudoRehearsalPlugin(SupervisedPlugin):
    r"""The network's old outputs are held on pseudo-images of the old classes.

    With :math:`N` images in the task and :math:`M` before it the loss gains the penalty

    .. math:: \frac{M}{N} \, E_x \, KL(p_{old}(\cdot \mid x) \| p_\theta(\cdot \mid x))

    with :math:`x` from :class:`ClassGaussians` and the network before the task as teacher.  The
    Fisher information is the second derivative of this divergence at the old parameters.  Online
    EWC with the full matrix is therefore its second-order approximation, on the images themselves.
    Here it is exact far from the old parameters, on images that are alike in their first two
    moments only.  There is no strength to tune: a task weighs as many images as it had.

    Sources: A. Robins, *Catastrophic forgetting, rehearsal and pseudorehearsal*, Connection Science
    7, 1995 (doi:10.1080/09540099550039318), with uniform noise as pseudo-images; H. Shin et al.,
    *Continual learning with deep generative replay*, 2017 (arXiv:1705.08690), with a trained
    generator.

    Args:
        rank: the principal components that are kept of a class's images.
        batch_size: the pseudo-images in a training step.
    """

    def __init__(self, rank: int, batch_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.batch_size = batch_size
        self.gaussians: ClassGaussians | None = None
        self.teacher: nn.Module | None = None

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Check the images of the task.

        Raises:
            ValueError: they are not rows of floating-point numbers.
        """
        data = strategy.experience.data
        images, *_rest = data.batch(torch.arange(1, device=data.labels.device))
        if images.dim() != 2 or not images.is_floating_point():
            raise ValueError(
                "pseudo_rehearsal needs images as rows of floating-point numbers, [n, pixels], got "
                f"{list(images.shape)} of {images.dtype}."
            )

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the divergence to the loss of the current mini-batch."""
        if self.gaussians is None or self.teacher is None:
            return
        images, tasks = self.gaussians.draw(self.batch_size)
        with torch.no_grad():
            old = avalanche_forward(self.teacher, images, tasks)
        new = avalanche_forward(strategy.model, images, tasks)
        divergence = Categorical().kl(old, new).mean()
        weight = self.gaussians.counts.sum() / len(strategy.experience.data)
        strategy.loss = strategy.loss + weight * divergence

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Keep the network, and the Gaussians of the task."""
        data = strategy.experience.data
        images, labels, *_rest = data.batch(torch.arange(len(data), device=data.labels.device))
        new = ClassGaussians.of(images, labels, self.rank, data.task)
        self.gaussians = new if self.gaussians is None else self.gaussians + new
        self.teacher = _frozen(strategy.model)

    def state(self) -> dict[str, Any]:
        """The Gaussians, and the network after the last task."""
        gaussians = None if self.gaussians is None else self.gaussians.state()
        return {
            "gaussians": gaussians,
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
        }

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        if state["teacher"] is not None:
            tensors = {name: t.to(strategy.device) for name, t in state["gaussians"].items()}
            self.gaussians = ClassGaussians(**tensors)
            self.teacher = _frozen(strategy.model)
            self.teacher.load_state_dict(state["teacher"])


def _frozen(model: nn.Module) -> nn.Module:
    """A copy for evaluation, without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)
