"""The networks and batches of ``bench_fisher.py`` and ``bench_accelerator.py``."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.tasks.images import MNIST

Batches = Sequence[tuple[Tensor, Tensor]]
Workload = tuple[nn.Module, Tensor, Tensor, int]
"""A network, all inputs, all labels, the size of a batch."""

CLASSES = 10
WIDTHS = (784, 400, 400, CLASSES)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions.

    Args:
        inputs: the channels that come in.
        outputs: the channels that go out.
        stride: that of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *convolution(inputs, outputs, 3, stride), nn.ReLU(), *convolution(outputs, outputs, 3)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The activations after the block."""
        return self.activation(self.path(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its BatchNorm, whose statistics are plain means of what it has seen."""
    kernel = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [kernel, nn.BatchNorm2d(outputs, momentum=None)]


class ResNet18(nn.Module):
    """ResNet-18 for images of 32x32 pixels, of modules and sums that BackPACK can convert."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, 64, 3), nn.ReLU())
        blocks: list[nn.Module] = []
        for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
            blocks += [Block(inputs, outputs, outputs // inputs), Block(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AvgPool2d(4)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.flatten(self.pool(self.blocks(self.stem(x)))))


class Transformer(nn.Module):
    """A Transformer encoder of two layers over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 64)
        self.positions = nn.Parameter(0.1 * torch.randn(16, 64))
        block = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(block, 2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.encoder(self.tokens(x) + self.positions).mean(1))


class VisionTransformer(nn.Module):
    """ViT-S: 12 layers of width 384 over patches of 16 x 16 pixels, the first token's output.

    Args:
        side: the side of an image in pixels.
    """

    def __init__(self, side: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 384, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, 384))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // 16) ** 2 + 1, 384))
        self.blocks = nn.Sequential(*(layer(384, 6) for _ in range(12)))
        self.norm = nn.LayerNorm(384)
        self.head = nn.Linear(384, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class Gpt2(nn.Module):
    """GPT-2 small as a classifier: 12 causal layers of width 768, the last token's output.

    Args:
        words: the number of different tokens.
    """

    def __init__(self, words: int = 50257) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 768)
        self.positions = nn.Embedding(1024, 768)
        self.blocks = nn.ModuleList(layer(768, 12) for _ in range(12))
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        length = x.shape[1]
        places = torch.arange(length, device=x.device)
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        tokens = self.words(x) + self.positions(places)
        for block in self.blocks:
            tokens = block(tokens, src_mask=mask)
        return self.head(self.norm(tokens[:, -1]))


def layer(width: int, heads: int) -> nn.Module:
    """A layer of a Transformer with its norms first."""
    options: dict[str, Any] = {"batch_first": True, "norm_first": True, "activation": "gelu"}
    return nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, **options)


def mlp(data_root: Path) -> Workload:
    """784-400-400-10 over 10,000 images of MNIST."""
    images = MNIST().load(data_root)[0]
    layers = [module for i, o in pairwise(WIDTHS) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), images.pixels[:10_000], images.labels[:10_000], 500


def cnn(data_root: Path) -> Workload:
    """Two convolutions and two linear layers over 2,000 images of MNIST."""
    images = MNIST().load(data_root)[0]
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )
    return model, images.pixels[:2000].reshape(-1, 1, 28, 28), images.labels[:2000], 100


def resnet18(_: Path) -> Workload:
    """ResNet-18 over 64 random images, with the statistics of their activations."""
    model, x = ResNet18(), torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        model(x)
    return model, x, torch.randint(CLASSES, (64,)), 16


def transformer(_: Path) -> Workload:
    """A Transformer encoder over 500 random sequences."""
    return Transformer(), torch.randint(1000, (500, 16)), torch.randint(CLASSES, (500,)), 50


WORKLOADS = {make.__name__: make for make in (mlp, cnn, resnet18, transformer)}


def workload(name: str, data_root: Path) -> tuple[nn.Module, Batches]:
    """A network in evaluation mode and its batches, the same every time."""
    torch.manual_seed(0)
    model, x, y, size = WORKLOADS[name](data_root)
    return model.eval(), list(zip(x.split(size), y.split(size), strict=True))


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of linear and convolutional layers that are called as such, by name."""
    return {
        f"{name}.{local}": parameter
        for name, module in model.named_modules()
        if type(module) in {nn.Linear, nn.Conv2d}
        for local, parameter in module.named_parameters()
    }


def count_of(batches: Batches) -> int:
    """The number of examples."""
    return sum(len(y) for _, y in batches)


def pieces(batches: Batches, rows: int) -> Batches:
    """The same examples, at most so many at once."""
    rows = max(1, rows)
    return [piece for x, y in batches for piece in zip(x.split(rows), y.split(rows), strict=True)]


def by_gradients(batches: Batches, model: nn.Module) -> Batches:
    """The same examples, so many at once that their gradients are of a size that is fast."""
    return pieces(batches, max(6, 2**24 // sum(p.numel() for p in model.parameters())))


def labels_of(estimator: str, outputs: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The labels whose gradients an estimator squares, and their weights: pairs of ``[n]``."""
    if estimator == "empirical":
        return [(y, torch.ones(len(y), device=y.device))]
    probabilities = outputs.softmax(1)
    if estimator == "Monte Carlo":
        return [(probabilities.multinomial(1)[:, 0], torch.ones(len(y), device=y.device))]
    return [(torch.full_like(y, k), weights) for k, weights in enumerate(probabilities.T)]
