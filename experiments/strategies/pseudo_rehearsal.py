"""Pseudo-rehearsal: the old outputs are held on images drawn from each class's moments."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Generator, Tensor, nn

from ewc import Categorical
from ewc.checks import check_count
from experiments.strategies.fisher import Fisher
from experiments.strategies.strategy import Strategy

BATCHES_PER_DRAW = 16
"""Mini-batches of pseudo-images that are drawn at once, so that a class's factor is read once."""


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
    r"""A Gaussian for the images of each class of a task.

    It keeps sums over images, and no image.  A pseudo-image is
    :math:`m + \sum_i z_i \sqrt{\lambda_i} v_i` with :math:`z \sim N(0, I)`.  :math:`m` is the mean
    of the class, and :math:`\lambda_i`, :math:`v_i` are the leading eigenvalues and eigenvectors of
    its covariance.  Pixels are not cut to the range of images, which would shift the mean.

    Attributes:
        means: ``[g, pixels]``.
        factors: the rows :math:`\sqrt{\lambda_i} v_i`, ``[g, rank, pixels]``.
        counts: the images of every class.
    """

    def __init__(self, means: Tensor, factors: Tensor, counts: list[int]) -> None:
        self.means = means
        self.factors = factors
        self.counts = counts

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, rank: int) -> "ClassGaussians":
        """The Gaussians of a task.

        Args:
            images: ``[n, pixels]``.
            labels: ``[n]``.
            rank: the eigenvectors that are kept, of at most as many as there are pixels.
        """
        means, factors, counts = [], [], []
        for label in torch.unique(labels):
            of_class = images[labels == label]
            means.append(of_class.mean(0))
            factors.append(_principal_components(of_class - means[-1], rank))
            counts.append(len(of_class))
        return cls(torch.stack(means), torch.stack(factors), counts)

    def draw(self, numbers: Sequence[int], generator: Generator, out: Tensor) -> None:
        """Draw ``numbers[i]`` pseudo-images of class ``i`` into ``out``, class by class.

        Args:
            numbers: the images to draw of each class.
            generator: a generator on the device of the means.
            out: ``[n, pixels]`` with ``n`` the sum of ``numbers``.
        """
        classes = zip(self.means, self.factors, torch.split(out, list(numbers)), strict=True)
        for mean, factor, rows in classes:
            shape = len(rows), len(factor)
            noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
            torch.addmm(mean, noise, factor, out=rows)


@dataclass(frozen=True)
class PastTask:
    """What is kept of a task.

    Attributes:
        gaussians: the moments of its classes.
        teacher: the network after it.
        label: the task label, if the task is known.
    """

    gaussians: ClassGaussians
    teacher: nn.Module
    label: int | None

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's outputs, and the task labels."""
        labels = torch.full((len(images),), self.label or 0, device=images.device)
        with torch.no_grad():
            return avalanche_forward(self.teacher, images, labels), labels

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        teacher = self.teacher.state_dict()
        return {"gaussians": dict(vars(self.gaussians)), "teacher": teacher, "label": self.label}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], strategy: Any) -> "PastTask":
        """The task that ``state`` describes; its teacher is built like the strategy's network."""
        kept = state["gaussians"]
        means, factors = (kept[name].to(strategy.device) for name in ("means", "factors"))
        teacher = _frozen(strategy.model)
        teacher.load_state_dict(state["teacher"])
        return cls(ClassGaussians(means, factors, kept["counts"]), teacher, state["label"])


def _principal_components(deviations: Tensor, rank: int) -> Tensor:
    r"""The rows :math:`\sqrt{\lambda_i} v_i` of the covariance, ``[min(rank, pixels), pixels]``.

    Rows beyond the number of images are 0.
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


class PseudoImages:
    """Mini-batches of pseudo-images of all past tasks, with the outputs of each task's teacher.

    Args:
        past: what is kept of the tasks.
        batch_size: the pseudo-images in a mini-batch.
    """

    def __init__(self, past: Sequence[PastTask], batch_size: int) -> None:
        self.past = past
        self.batch_size = batch_size
        self.counts = [count for task in past for count in task.gaussians.counts]
        means = past[0].gaussians.means
        # Written again in each draw: fresh memory would take longer than the images.
        self._images = means.new_empty(BATCHES_PER_DRAW * batch_size, means.shape[1])
        self._drawn: list[Tensor] = []  # images, outputs, labels
        self._batches: list[Tensor] = []  # the rows of each mini-batch that is left
        self._seed = 0

    def batch(self) -> list[Tensor]:
        """Pseudo-images ``[n, pixels]``, their old outputs ``[n, c]`` and task labels ``[n]``."""
        if not self._batches:
            self._draw(int(torch.randint(2**62, ())))
        rows = self._batches.pop()
        return [of_all[rows] for of_all in self._drawn]

    def _draw(self, seed: int) -> None:
        """Draw the images of the next mini-batches, and shuffle them."""
        device = self._images.device
        generator = torch.Generator(device).manual_seed(seed)
        numbers = iter(self._shares(generator))
        shares = [[next(numbers) for _ in task.gaussians.counts] for task in self.past]
        of_tasks = torch.split(self._images, [sum(share) for share in shares])
        recalled = []
        for task, share, images in zip(self.past, shares, of_tasks, strict=True):
            if len(images):
                task.gaussians.draw(share, generator, out=images)
                recalled += [task.outputs(part) for part in torch.split(images, self.batch_size)]
        outputs, labels = (torch.cat(parts) for parts in zip(*recalled, strict=True))
        self._drawn = [self._images, outputs, labels]
        order = torch.randperm(len(self._images), generator=generator, device=device)
        self._batches, self._seed = list(torch.split(order, self.batch_size)), seed

    def _shares(self, generator: Generator) -> list[int]:
        """The images to draw of every class, by systematic sampling.

        A class has its share by its count, rounded up or down at random.
        """
        device, num_images = self._images.device, len(self._images)
        start = torch.rand((), generator=generator, dtype=torch.double, device=device).cpu()
        positions = (torch.arange(num_images) + start) * (sum(self.counts) / num_images)
        ends = torch.tensor(self.counts).cumsum(0)
        chosen = torch.searchsorted(ends, positions, right=True)
        chosen = chosen.clamp_max(len(ends) - 1)  # a position may round up to the end
        shares: list[int] = torch.bincount(chosen, minlength=len(ends)).tolist()
        return shares

    def state(self) -> dict[str, Any]:
        """Which images are drawn, and how many mini-batches of them are left."""
        return {"seed": self._seed, "left": len(self._batches)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if state["left"]:
            self._draw(state["seed"])
            del self._batches[state["left"] :]


class PseudoRehearsalPlugin(SupervisedPlugin):
    r"""The outputs that each old task was left with are held on pseudo-images of its classes.

    With :math:`N` images in the task, :math:`M_k` in the old task :math:`k`, and the parameters
    :math:`\theta_k` after it, the loss gains

    .. math:: \sum_k \frac{M_k}{N} \, E_{x \sim k} \,
              KL(p_{\theta_k}(\cdot \mid x) \| p_\theta(\cdot \mid x))

    with :math:`x` from the task's :class:`ClassGaussians`.  The Fisher information is the second
    derivative of this divergence at :math:`\theta_k`: EWC at strength 1, with a quadratic per task
    and the full matrix, is its second-order approximation on the images themselves.  Here it is
    exact far from the old parameters, on images that have only the class means and the leading part
    of the covariances.  There is no strength to tune: a task weighs as many images as it had.

    Every task has its own teacher, so that the errors of one are not passed on to the next.

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
        self.past: list[PastTask] = []
        self.rehearsal: PseudoImages | None = None

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
        if self.past:
            self.rehearsal = PseudoImages(self.past, self.batch_size)

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the divergence to the loss of the current mini-batch."""
        if self.rehearsal is None:
            return
        images, old, labels = self.rehearsal.batch()
        new = avalanche_forward(strategy.model, images, labels)
        weight = sum(self.rehearsal.counts) / len(strategy.experience.data)
        strategy.loss = strategy.loss + weight * Categorical().kl(old, new).mean()

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Keep the network, and the Gaussians of the task."""
        data = strategy.experience.data
        images, labels, *_rest = data.batch(torch.arange(len(data), device=data.labels.device))
        gaussians = ClassGaussians.of(images, labels, self.rank)
        self.past.append(PastTask(gaussians, _frozen(strategy.model), data.task))
        self.rehearsal = None

    def state(self) -> dict[str, Any]:
        """What is kept of every task, and which pseudo-images are drawn."""
        return {
            "past": [task.state() for task in self.past],
            "drawn": None if self.rehearsal is None else self.rehearsal.state(),
        }

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a state."""
        self.past = [PastTask.from_state(kept, strategy) for kept in state["past"]]
        if state["drawn"] is not None:
            self.rehearsal = PseudoImages(self.past, self.batch_size)
            self.rehearsal.restore(state["drawn"])


def _frozen(model: nn.Module) -> nn.Module:
    """A copy for evaluation, without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)
