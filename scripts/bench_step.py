"""The cost of a training step with the penalty beside a naive one.

``python scripts/bench_step.py [--network mlp] [--device cpu] [--threads 2]``: Adam, and the penalty
in the loss or by implicit steps.  The networks: ``mlp`` is 784-1000-1000-10 with batches of 128,
``resnet18`` ResNet-18 with batches of 128 images of 32x32, and ``gpt2`` modules of torch in the
sizes of GPT-2 small, 4 sequences of 64 tokens.  The ways take turns, step by step.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

# The tree that this file is in, not another one that is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_networks import ResNet18

from ewc import DiagonalFisher, EWCPenalty, Kronecker, Online, fisher_information

VOCABULARY, TOKENS, WIDTH, LAYERS, HEADS = 50257, 1024, 768, 12, 12


class GPT2(nn.Module):
    """A language model in the sizes of GPT-2 small: 124 million parameters, the head tied."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the next word, ``[n, words, t]``."""
        t = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(t, device=x.device)
        embedded = self.words(x) + self.positions.weight[:t]
        logits: Tensor = self.head(self.blocks(embedded, mask=mask, is_causal=True))
        return logits.mT


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """The MLP and a batch."""
    layers = [m for i, o in pairwise((784, 1000, 1000)) for m in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(1000, 10))
    return model, torch.rand(128, 784), torch.randint(10, (128,))


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-18 and a batch."""
    return ResNet18(), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def gpt2() -> tuple[nn.Module, Tensor, Tensor]:
    """The language model and a batch."""
    words = torch.randint(VOCABULARY, (4, 65))
    return GPT2(), words[:, :-1], words[:, 1:]


NETWORKS = {make.__name__: make for make in (mlp, resnet18, gpt2)}


def diagonal(model: nn.Module) -> EWCPenalty:
    """A penalty with random entries, whose step costs the same as with any others."""
    entries = {n: torch.rand_like(p).detach() for n, p in model.named_parameters()}
    penalty = EWCPenalty(1e-3, Online())
    penalty.consolidate(DiagonalFisher(entries, 256), model)
    return penalty


def kronecker(tasks: int, model: nn.Module, x: Tensor) -> EWCPenalty:
    """A penalty that has seen some tasks of random images."""
    penalty = EWCPenalty(10.0, Online())
    for _ in range(tasks):
        data = [(torch.rand_like(x), torch.randint(10, (len(x),), device=x.device))]
        penalty.consolidate(fisher_information(model, data, structure=Kronecker()), model)
    return penalty


@dataclass(eq=False)
class Way:
    """How the penalty takes its part: in the loss, or by an implicit step every so often.

    Attributes:
        penalty: the penalty; ``None`` for a naive step.
        share: the fraction of the eigenvectors used per step.
        every: the training steps from one implicit step to the next; ``None`` for the loss.
        seconds: the time of each step so far.
    """

    penalty: EWCPenalty | None = None
    share: float = 1.0
    every: int | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The seconds of a step: the median, or the mean where steps differ on purpose."""
        robust: Callable[[list[float]], float] = (
            statistics.median if self.every is None else statistics.fmean
        )
        return robust(self.seconds)


def measure(model: nn.Module, x: Tensor, y: Tensor, ways: list[Way], rounds: int) -> None:
    """Take steps of all ways in turn, and note the time of each."""
    fused = x.device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=fused)
    for number in range(-2, rounds):  # two to warm up
        for way in ways if number % 2 else ways[::-1]:
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            if way.penalty is not None and way.every is None:
                way.penalty.eigenvector_share = way.share
                loss = loss + way.penalty(model)
            loss.backward()
            optimizer.step()
            if way.penalty is not None and way.every is not None and number % way.every == 0:
                way.penalty.implicit_step(model, optimizer, way.every)
            if fused:
                torch.cuda.synchronize()
            if number >= 0:
                way.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200, help="steps of each way")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model, x, y = NETWORKS[arguments.network]()
    model, x, y = (thing.to(arguments.device) for thing in (model, x, y))
    ways = {"naive": Way(), "diagonal": Way(diagonal(model))}
    if arguments.network == "mlp":
        few, many = kronecker(2, model, x), kronecker(50, model, x)
        ways |= {
            "K-FAC in the loss, 2 tasks": Way(few),
            "K-FAC in the loss, 50 tasks": Way(many),
            "K-FAC, a tenth a step, 2 tasks": Way(kronecker(2, model, x), share=0.1),
            "K-FAC, a twentieth a step, 2 tasks": Way(kronecker(2, model, x), share=0.05),
            "K-FAC, a twentieth a step, 50 tasks": Way(kronecker(50, model, x), share=0.05),
            "K-FAC implicit every 10, 2 tasks": Way(few, every=10),
            "K-FAC implicit every 10, 50 tasks": Way(many, every=10),
        }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    measure(model, x, y, list(ways.values()), arguments.rounds)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, "
        f"{arguments.network}, {size:.1f} million parameters, {arguments.rounds} steps of each"
    )
    naive = ways["naive"].mean
    for name, way in ways.items():
        print(f"{name:35s} {1e3 * way.mean:9.2f} ms  {way.mean / naive:5.2f} x naive")


if __name__ == "__main__":
    main()
