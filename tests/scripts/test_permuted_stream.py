"""The sparse step against torch's own gradient descent, and the stream on a few images."""

import argparse

import permuted_stream
import torch
from torch import nn

from experiments.tasks.images import Images


def test_a_step_is_gradient_descent_on_the_cross_entropy():
    model = permuted_stream.network(12, 7, 4)
    image = torch.tensor([0, 0.5, 0, 0, 1.0, 0.25, 0, 0, 0, 0.75, 0, 0])
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(image)[None], torch.tensor([2]))
    gradients = torch.autograd.grad(loss, parameters)
    expected = [p.detach() - 0.3 * g for p, g in zip(parameters, gradients, strict=True)]
    assert all(gradient.any() for gradient in gradients)
    inputs = image.nonzero()[:, 0].numpy()
    permuted_stream.step(model, inputs, image[inputs], 2, 0.3)
    for value, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted)


def test_a_permuted_image_has_its_pixels_where_the_step_writes():
    pixels = torch.rand(3, 6)
    permutation = torch.randperm(6)
    moved = permuted_stream.permuted(pixels, permutation)
    for image, other in zip(pixels, moved, strict=True):
        for place, value in enumerate(image):
            assert other[permutation[place]] == value


def test_the_penalty_keeps_old_tasks(monkeypatch, capsys):
    monkeypatch.setattr(permuted_stream, "FISHER_IMAGES", 200)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    prototypes = torch.rand(10, 64, generator=generator) * (
        torch.rand(10, 64, generator=generator) < 0.3
    )
    noise = torch.rand(600, 64, generator=generator)
    images = Images(prototypes[labels] * noise, labels)
    options = {"tasks": 4, "units": 32, "lr": 0.05, "decay": 1.0}
    firsts = []
    for strength in (0.0, 30.0):
        last, learnt = permuted_stream.run(
            images, images, 0, argparse.Namespace(strength=strength, **options)
        )
        assert len(last) == 4
        assert learnt > 60
        firsts.append(last[0])
    assert firsts[1] > firsts[0] + 10
    assert len(capsys.readouterr().out.splitlines()) == 2
