"""The blocks of steps against torch's own gradient descent, and the stream on a few images."""

import copy

import permuted_stream
import torch
from torch import nn

from ewc import EWCPenalty
from experiments.tasks.images import Images


def test_each_image_is_a_step_of_gradient_descent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4))
    expected = copy.deepcopy(model)
    images, labels = torch.rand(6, 12), [2, 0, 3, 3, 1, 2]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    for image, label in zip(images, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(image)[None], torch.tensor([label])).backward()
        assert all(parameter.grad.any() for parameter in expected.parameters())
        optimizer.step()
    permuted_stream.descend(model, images, labels, 0.3)
    for value, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, wanted)


def test_weight_decay_is_that_of_gradient_descent(monkeypatch):
    """Where no image is learnt, a task multiplies the weights by ``(1 - lr * decay) ** images``."""
    images = Images(torch.zeros(300, 64), torch.arange(300) % 10)
    options = {"tasks": 1, "units": 8, "lr": 0.05, "decay": 1.0, "strength": 0.0}
    models = []
    original = permuted_stream.accuracy
    monkeypatch.setattr(
        permuted_stream, "accuracy", lambda *args: models.append(args[0]) or original(*args)
    )
    permuted_stream.run(images, images, 0, permuted_stream.Stream(weight_decay=0.1, **options))
    torch.manual_seed(0)
    started = nn.Linear(64, 8).weight.detach()
    torch.testing.assert_close(models[0][0].weight.detach(), started * 0.995**300)


def test_a_pixel_moves_to_its_place_in_the_permutation():
    pixels = torch.rand(3, 6)
    permutation = torch.randperm(6)
    moved = permuted_stream.permuted(pixels, permutation)
    for image, other in zip(pixels, moved, strict=True):
        for place, value in enumerate(image):
            assert other[permutation[place]] == value


def some_images():
    """600 images of ten classes, of which most pixels are 0."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    prototypes = torch.rand(10, 64, generator=generator)
    prototypes *= torch.rand(10, 64, generator=generator) < 0.3
    return Images(prototypes[labels] * torch.rand(600, 64, generator=generator), labels)


def test_the_penalty_keeps_old_tasks(monkeypatch, capsys):
    monkeypatch.setattr(permuted_stream, "FISHER_IMAGES", 200)
    images = some_images()
    options = {"tasks": 4, "units": 32, "lr": 0.05, "decay": 1.0, "weight_decay": 0.0}
    firsts = []
    for strength in (0.0, 30.0):
        last, learnt = permuted_stream.run(
            images, images, 0, permuted_stream.Stream(strength=strength, **options)
        )
        assert len(last) == 4
        assert learnt > 60
        firsts.append(last[0])
    assert firsts[1] > firsts[0] + 10
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_information_is_of_the_permuted_images_and_fades(monkeypatch, capsys):
    seen = []
    consolidate = EWCPenalty.consolidate

    def spy(penalty, fisher, model, *, num_examples):
        consolidate(penalty, fisher, model, num_examples=num_examples)
        seen.append((penalty, fisher, copy.deepcopy(model), num_examples))

    monkeypatch.setattr(EWCPenalty, "consolidate", spy)
    monkeypatch.setattr(permuted_stream, "FISHER_IMAGES", 600)
    images = some_images()
    options = permuted_stream.Stream(
        tasks=2, units=8, lr=0.05, decay=0.6, strength=5.0, weight_decay=0.0
    )
    permuted_stream.run(images, images, 3, options)

    torch.manual_seed(3)
    nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))  # draws what the network drew
    diagonals = []
    for _penalty, fisher, model, num_examples in seen:
        places = torch.randperm(64)
        torch.randperm(600)  # the order of the images
        expected = torch.zeros_like(model[0].weight)
        for pixels in permuted_stream.permuted(images.pixels, places):
            outputs = model(pixels)
            for label, share in enumerate(outputs.detach().softmax(0)):
                loss = nn.functional.cross_entropy(outputs, torch.tensor(label))
                (gradient,) = torch.autograd.grad(loss, [model[0].weight], retain_graph=True)
                expected += share * gradient.square() / 600
        torch.testing.assert_close(fisher.diagonal()["0.weight"], expected, rtol=1e-3, atol=1e-6)
        assert num_examples == 600
        diagonals.append(expected)
    # The penalty is half of strength times the faded sum, relative to the images of a task.
    penalty, _fisher, moved, _num_examples = seen[-1]
    with torch.no_grad():
        moved[0].weight += 0.1
    wanted = 5.0 / 2 * 0.01 * (0.6 * diagonals[0] + diagonals[1]).sum()
    torch.testing.assert_close(penalty(moved).detach(), wanted, rtol=1e-3, atol=0)
