"""Pseudo-rehearsal against its definition: drawn images, their shares, and the divergence."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ewc.tensor_file import joined, separated
from experiments.strategies.pseudo_rehearsal import (
    BATCHES_PER_DRAW,
    ClassGaussians,
    PastTask,
    PseudoImages,
    PseudoRehearsalPlugin,
)
from experiments.tasks.benchmarks import TaskData
from experiments.tasks.images import MNIST, Images
from experiments.training.models import MLP

PIXELS = 6


def some_images(num_images=60, num_classes=3):
    """Correlated images with a mean of their own in every class, of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) ** 2 % num_classes
    mixing = torch.randn(PIXELS, PIXELS, generator=generator)
    pixels = torch.randn(num_images, PIXELS, generator=generator) @ mixing
    return pixels + labels[:, None].float(), labels


def test_the_moments_are_those_of_each_class():
    pixels, labels = some_images()
    gaussians = ClassGaussians.of(pixels, labels, PIXELS)
    assert gaussians.counts == [int((labels == k).sum()) for k in labels.unique()]
    for row, label in enumerate(labels.unique()):
        of_class = [pixels[i] for i in range(len(pixels)) if labels[i] == label]
        mean = sum(of_class) / len(of_class)
        covariance = sum(torch.outer(x - mean, x - mean) for x in of_class) / len(of_class)
        factor = gaussians.factors[row]
        torch.testing.assert_close(gaussians.means[row], mean)
        torch.testing.assert_close(factor.T @ factor, covariance, rtol=1e-4, atol=1e-5)


def test_a_low_rank_keeps_the_principal_components():
    pixels, labels = some_images(num_classes=1)
    factor = ClassGaussians.of(pixels, labels, 2).factors[0]
    _left, values, right = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    best = (right[:2].T * values[:2].square() / len(pixels)) @ right[:2]
    torch.testing.assert_close(factor.T @ factor, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_images", [1, 4])
def test_a_class_may_have_fewer_images_than_pixels(num_images):
    pixels, _ = some_images(num_images=num_images)
    labels = torch.zeros(num_images, dtype=torch.long)
    gaussians = ClassGaussians.of(pixels, labels, 5)
    assert gaussians.factors.shape == (1, 5, PIXELS)
    factor, deviations = gaussians.factors[0], pixels - pixels.mean(0)
    expected = deviations.T @ deviations / num_images
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-4, atol=1e-5)


def test_pixels_that_are_nearly_always_0_do_no_harm(mnist_root):
    train, _ = MNIST().load(mnist_root)
    ones = train.pixels[train.labels == 1]
    torch.set_flush_denormal(False)  # with denormal numbers eigh fails in single precision
    factor = ClassGaussians.of(ones, torch.ones(len(ones)), 50).factors[0]
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
    pixels, labels = some_images(num_classes=1)
    gaussians = ClassGaussians.of(pixels, labels, PIXELS)
    drawn = torch.empty(40_000, PIXELS)
    gaussians.draw([len(drawn)], torch.Generator().manual_seed(0), out=drawn)
    covariance = gaussians.factors[0].T @ gaussians.factors[0]
    error = covariance.diagonal().sqrt() / len(drawn) ** 0.5
    assert float(((drawn.mean(0) - gaussians.means[0]) / error).abs().max()) < 4
    variances = covariance.diagonal()
    # The covariance of two normal numbers is known to sqrt((v_i v_j + c_ij^2) / n).
    spread = ((torch.outer(variances, variances) + covariance.square()) / len(drawn)).sqrt()
    assert float(((torch.cov(drawn.T, correction=0) - covariance) / spread).abs().max()) < 4


def test_each_class_gets_its_number_of_images():
    pixels, labels = some_images()
    gaussians = ClassGaussians.of(pixels, labels, PIXELS)
    gaussians.factors.zero_()
    drawn = torch.empty(5, PIXELS)
    gaussians.draw([3, 2], torch.Generator(), out=drawn)
    torch.testing.assert_close(drawn, gaussians.means[[0, 0, 0, 1, 1]])


def all_of_a_draw(rehearsal):
    """All mini-batches of one draw: images, outputs, and task labels."""
    batches = [rehearsal.batch() for _ in range(BATCHES_PER_DRAW)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def test_classes_are_drawn_in_proportion_to_their_images():
    past = []
    for task, counts in enumerate([[5, 1], [30, 24]]):
        # The pixels of an image say which class it is of.
        means = torch.tensor([[2.0 * task], [2.0 * task + 1]])
        gaussians = ClassGaussians(means, torch.zeros(2, 1, 1), counts)
        past.append(PastTask(gaussians, nn.Linear(1, 2), task))
    rehearsal = PseudoImages(past, 25)
    num_images = 25 * BATCHES_PER_DRAW
    numbers = torch.zeros(4)
    for _ in range(200):
        images, _outputs, labels = all_of_a_draw(rehearsal)
        assert len(images) == num_images
        assert torch.equal(labels, images[:, 0].long() // 2)
        of_draw = torch.bincount(images[:, 0].long(), minlength=4)
        expected = torch.tensor([5, 1, 30, 24]) * (num_images / 60)
        assert float((of_draw - expected).abs().max()) < 1
        numbers += of_draw
        # No batch is made of a few classes only.
        assert set(images[:25, 0].tolist()) >= {2.0, 3.0}
    # A share is rounded up or down at random: 33.33, 6.67, 200 and 160 in the mean.
    torch.testing.assert_close(numbers / 200, expected, rtol=0, atol=0.15)


def test_drawn_images_are_used_once():
    pixels, labels = some_images()
    plugin = PseudoRehearsalPlugin(rank=2, batch_size=4)
    learnt(MLP(hidden=[5]).build(PIXELS, 3, None), plugin, pixels, labels)
    rehearsal = PseudoImages(plugin.past, 4)
    seen = torch.cat([all_of_a_draw(rehearsal)[0] for _ in range(3)])
    assert len(seen.unique(dim=0)) == len(seen)


def learnt(model, plugin, pixels, labels, task=None):
    """Give a task that ``model`` has learnt to the plugin."""
    data = TaskData(Images(pixels, labels), labels, None, None, task)
    plugin.after_training_exp(SimpleNamespace(model=model, experience=SimpleNamespace(data=data)))


@pytest.mark.parametrize("heads", [None, 2])
def test_the_loss_gains_the_divergence_from_the_network_after_each_task(heads):
    pixels, labels = some_images()
    model = MLP(hidden=[5]).build(PIXELS, 3, heads)
    plugin = PseudoRehearsalPlugin(rank=2, batch_size=16)
    states = []
    for task in range(2):
        shifted = pixels + 100 * task  # so that an image tells its task
        learnt(model, plugin, shifted, labels, None if heads is None else task)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))  # the teacher must be a copy
    new = {name: value.clone() for name, value in model.state_dict().items()}

    data = TaskData(Images(pixels[:40], labels[:40]), labels[:40], None, None, None)
    strategy = SimpleNamespace(
        model=model, loss=torch.tensor(0.7), experience=SimpleNamespace(data=data)
    )
    plugin.rehearsal = PseudoImages(plugin.past, plugin.batch_size)
    torch.manual_seed(1)
    plugin.before_backward(strategy)
    torch.manual_seed(1)
    images_of_step, _outputs, _labels = PseudoImages(plugin.past, plugin.batch_size).batch()

    total = 0.0
    seen = set()
    for image in images_of_step:
        task = int(image.mean() > 50)
        seen.add(task)
        logits = []
        for state in (states[task], new):
            model.load_state_dict(state)
            arguments = () if heads is None else (torch.tensor([task]),)
            logits.append(model(image[None], *arguments)[0].detach().double())
        log_p, log_q = (values.log_softmax(0) for values in logits)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    assert seen == {0, 1}
    # Two tasks of 60 images stand against the 40 in training.
    expected = 0.7 + 120 / 40 * total / len(images_of_step)
    assert expected > 1
    assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_first_task_is_trained_as_by_fine_tuning():
    strategy = SimpleNamespace(model=nn.Linear(PIXELS, 3), loss=torch.tensor(0.7))
    PseudoRehearsalPlugin(2, 16).before_backward(strategy)
    assert float(strategy.loss) == pytest.approx(0.7)


def test_the_next_task_draws_from_the_one_that_has_ended():
    pixels, labels = some_images()
    model = MLP(hidden=[5]).build(PIXELS, 3, None)
    plugin = PseudoRehearsalPlugin(rank=2, batch_size=16)
    learnt(model, plugin, pixels, labels)
    data = TaskData(Images(pixels, labels), labels, None, None, None)
    strategy = SimpleNamespace(model=model, experience=SimpleNamespace(data=data))
    plugin.before_training_exp(strategy)
    assert plugin.rehearsal.batch()[0].max() < 50
    learnt(model, plugin, pixels + 100, labels)
    assert plugin.state()["drawn"] is None
    plugin.before_training_exp(strategy)
    assert plugin.rehearsal.batch()[0].max() > 50


def test_a_task_without_an_image_in_the_draw_is_left_out():
    rare = ClassGaussians(torch.zeros(1, 1), torch.zeros(1, 1, 1), [1])
    frequent = ClassGaussians(torch.ones(1, 1), torch.zeros(1, 1, 1), [10**6])
    network = MLP(hidden=[3]).build(1, 2, 2)
    past = [PastTask(rare, network, 0), PastTask(frequent, network, 1)]
    images, _outputs, labels = all_of_a_draw(PseudoImages(past, 1))
    assert images.min() == labels.min() == 1


@pytest.mark.parametrize("used", [0, 3, BATCHES_PER_DRAW])
def test_a_restored_plugin_goes_on_with_the_same_images(used):
    pixels, labels = some_images()
    model = MLP(hidden=[5], dropout=0.5).build(PIXELS, 3, 2).train()
    plugin = PseudoRehearsalPlugin(rank=2, batch_size=16)
    for task in (1, 0):
        learnt(model, plugin, pixels + 100 * task, labels, task)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    plugin.rehearsal = PseudoImages(plugin.past, plugin.batch_size)
    for _ in range(used):
        plugin.rehearsal.batch()
    random = torch.get_rng_state()
    tensors, outline = separated(plugin.state())
    expected = [plugin.rehearsal.batch() for _ in range(20)]
    assert set(expected[0][2].tolist()) == {0, 1}

    other = PseudoRehearsalPlugin(rank=2, batch_size=16)
    strategy = SimpleNamespace(model=model, device=torch.device("cpu"))
    other.restore(joined(tensors, json.loads(json.dumps(outline))), strategy)
    torch.set_rng_state(random)
    for batch in expected:
        for one, two in zip(batch, other.rehearsal.batch(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
