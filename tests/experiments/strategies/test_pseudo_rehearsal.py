"""Pseudo-rehearsal against its definition: drawn images, their shares, and the divergence."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.strategies.pseudo_rehearsal import (
    DRAWS_PER_STEP,
    ClassGaussians,
    PseudoRehearsalPlugin,
)
from experiments.tasks.benchmarks import TaskData
from experiments.tasks.images import MNIST, Images
from experiments.training.models import MLP

PIXELS = 6


def images(num_images=60, num_classes=3):
    """Correlated images with a mean of their own in every class, of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) ** 2 % num_classes
    mixing = torch.randn(PIXELS, PIXELS, generator=generator)
    pixels = torch.randn(num_images, PIXELS, generator=generator) @ mixing
    return pixels + labels[:, None].float(), labels


def test_the_moments_are_those_of_each_class():
    pixels, labels = images()
    gaussians = ClassGaussians.of(pixels, labels, PIXELS, task=None)
    assert gaussians.counts.tolist() == [int((labels == k).sum()) for k in labels.unique()]
    for row, label in enumerate(labels.unique()):
        of_class = [pixels[i] for i in range(len(pixels)) if labels[i] == label]
        mean = sum(of_class) / len(of_class)
        covariance = sum(torch.outer(x - mean, x - mean) for x in of_class) / len(of_class)
        factor = gaussians.factors[row]
        torch.testing.assert_close(gaussians.means[row], mean)
        torch.testing.assert_close(factor.T @ factor, covariance, rtol=1e-4, atol=1e-5)


def test_a_low_rank_keeps_the_principal_components():
    pixels, labels = images(num_classes=1)
    factor = ClassGaussians.of(pixels, labels, 2, task=None).factors[0]
    _left, values, right = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    best = (right[:2].T * values[:2].square() / len(pixels)) @ right[:2]
    torch.testing.assert_close(factor.T @ factor, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_images", [1, 4])
def test_a_class_may_have_fewer_images_than_pixels(num_images):
    pixels, _ = images(num_images=num_images)
    labels = torch.zeros(num_images, dtype=torch.long)
    gaussians = ClassGaussians.of(pixels, labels, 5, task=None)
    assert gaussians.factors.shape == (1, 5, PIXELS)
    factor, deviations = gaussians.factors[0], pixels - pixels.mean(0)
    expected = deviations.T @ deviations / num_images
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-4, atol=1e-5)


def test_pixels_that_are_nearly_always_0_do_no_harm(mnist_root):
    train, _ = MNIST().load(mnist_root)
    ones = train.pixels[train.labels == 1]
    torch.set_flush_denormal(False)  # with denormal numbers eigh fails in single precision
    factor = ClassGaussians.of(ones, torch.ones(len(ones)), 50, task=None).factors[0]
    deviations = (ones - ones.mean(0)).double()
    _left, values, _right = torch.linalg.svd(deviations, full_matrices=False)
    variances = values[:50].square() / len(ones)
    torch.testing.assert_close(
        factor.double().square().sum(1).flip(0), variances, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("bad", [torch.zeros(8, 1, 4, 4), torch.zeros(8, 4, dtype=torch.long)])
def test_other_images_are_refused_before_training(bad):
    labels = torch.zeros(8, dtype=torch.long)
    data = TaskData(Images(bad, labels), labels, None, None, None)
    strategy = SimpleNamespace(experience=SimpleNamespace(data=data))
    with pytest.raises(ValueError, match=r"rows of floating-point numbers, \[n, pixels\], got \["):
        PseudoRehearsalPlugin(2, 16).before_training_exp(strategy)


def test_drawn_images_have_the_moments_of_the_classes():
    pixels, labels = images(num_classes=1)
    gaussians = ClassGaussians.of(pixels, labels, PIXELS, task=None)
    drawn, _ = gaussians.draw(40_000)
    covariance = gaussians.factors[0].T @ gaussians.factors[0]
    error = covariance.diagonal().sqrt() / len(drawn) ** 0.5
    assert float(((drawn.mean(0) - gaussians.means[0]) / error).abs().max()) < 4
    variances = covariance.diagonal()
    # The covariance of two normal numbers is known to sqrt((v_i v_j + c_ij^2) / n).
    spread = ((torch.outer(variances, variances) + covariance.square()) / len(drawn)).sqrt()
    assert float(((torch.cov(drawn.T, correction=0) - covariance) / spread).abs().max()) < 4


def test_tasks_are_drawn_in_proportion_to_their_images():
    counts, tasks = torch.tensor([5, 1, 30, 24]), torch.tensor([3, 1, 0, 2])
    factors = torch.zeros(4, 2, PIXELS)
    gaussians = ClassGaussians(torch.zeros(4, PIXELS), factors, counts, tasks)
    drawn = torch.cat([gaussians.draw(DRAWS_PER_STEP)[1] for _ in range(2000)])
    for count, task in zip(counts, tasks, strict=True):
        share = float((drawn == task).double().mean())
        expected = float(count / counts.sum())
        # Systematic draws vary less than independent ones.
        assert abs(share - expected) < 4 * (expected / len(drawn)) ** 0.5


def learnt(model, plugin, pixels, labels, task=None):
    """Give a task that ``model`` has learnt to the plugin."""
    data = TaskData(Images(pixels, labels), labels, None, None, task)
    plugin.after_training_exp(SimpleNamespace(model=model, experience=SimpleNamespace(data=data)))


@pytest.mark.parametrize("heads", [None, 2])
def test_the_loss_gains_the_divergence_from_the_old_network(heads):
    pixels, labels = images()
    model = MLP(hidden=[5]).build(PIXELS, 3, heads)
    plugin = PseudoRehearsalPlugin(rank=2, batch_size=DRAWS_PER_STEP)
    for task in range(2):
        learnt(model, plugin, pixels, labels, None if heads is None else task)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # the teacher must be a copy
    new = {name: value.clone() for name, value in model.state_dict().items()}

    data = TaskData(Images(pixels[:40], labels[:40]), labels[:40], None, None, None)
    strategy = SimpleNamespace(
        model=model, loss=torch.tensor(0.7), experience=SimpleNamespace(data=data)
    )
    torch.manual_seed(1)
    plugin.before_backward(strategy)
    torch.manual_seed(1)
    drawn, tasks = plugin.gaussians.draw(DRAWS_PER_STEP)
    assert set(tasks.tolist()) == ({-1} if heads is None else {0, 1})

    total = 0.0
    for image, task in zip(drawn, tasks, strict=True):
        logits = []
        for state in (old, new):
            model.load_state_dict(state)
            arguments = () if heads is None else (task[None],)
            logits.append(model(image[None], *arguments)[0].detach().double())
        p, q = (values.exp() / values.exp().sum() for values in logits)
        total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    # Two tasks of 60 images stand against the 40 in training.
    expected = 0.7 + 120 / 40 * total / len(drawn)
    assert expected > 1
    assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_first_task_is_trained_as_by_fine_tuning():
    strategy = SimpleNamespace(model=nn.Linear(PIXELS, 3), loss=torch.tensor(0.7))
    PseudoRehearsalPlugin(2, 16).before_backward(strategy)
    assert float(strategy.loss) == pytest.approx(0.7)
