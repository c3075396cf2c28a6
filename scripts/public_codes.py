"""What eight public codes compute as the diagonal Fisher information, restated from their sources.

Every function is one formula, written anew.  It takes a classifier, inputs ``x`` ``[n, ...]`` and
labels ``y`` ``[n]``, leaves the classifier as it was, and returns one entry per parameter ``[p]``.
``CODES`` lists them with their sources, ``conventions.py`` measures them.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Diagonal = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Code:
    """A public code, and what it computes.

    ``p_ny`` is the model's probability of label ``y`` of example ``n``, ``g_ny`` the gradient of
    ``log p_ny``, ``g_n`` that of the observed label, ``gbar_b`` the mean of ``g_n`` over batch
    ``b`` and ``n_b`` its size.  ``K`` is the number of batches, ``N`` that of examples.  ``B`` is
    the size of the loader's batches, where gradients are taken one example at a time.
    ``source`` is repository, commit, file and function.
    """

    name: str
    source: tuple[str, str, str, str]
    formula: str
    batch: int
    normalisation: str
    differs: str
    diagonal: Diagonal


def flat_gradient(objective: Tensor, model: nn.Module, *, again: bool = False) -> Tensor:
    """The gradient of a scalar with respect to all parameters, ``[p]``."""
    gradients = torch.autograd.grad(objective, list(model.parameters()), retain_graph=again)
    return torch.cat([gradient.flatten() for gradient in gradients])


def batch_means(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Of every batch its size and the gradient of its mean cross-entropy, ``[p]``."""
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        yield len(labels), flat_gradient(cross_entropy(model(inputs), labels), model)


def in_mode(model: nn.Module, *, training: bool) -> nn.Module:
    """A copy of the model in training or evaluation mode."""
    return deepcopy(model).train(training)


def squares_of_batch_means(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 128) -> Tensor:
    """``1/K sum_b gbar_b^2`` in evaluation mode: Avalanche and selective synaptic dampening."""
    squares = [g.square() for _, g in batch_means(in_mode(model, training=False), x, y, batch)]
    return torch.stack(squares).mean(0)


def pycil(
    model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 128, largest: float = 1e-4
) -> Tensor:
    """``min(1/K sum_b gbar_b^2, 1e-4)`` in training mode."""
    squares = [g.square() for _, g in batch_means(in_mode(model, training=True), x, y, batch)]
    return torch.stack(squares).mean(0).clamp(max=largest)


def mammoth(
    model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 32, training: bool = True
) -> Tensor:
    """``1/(K batch) sum_n p_n,y_n g_n^2`` in training mode, one example at a time.

    ``batch`` is the size of the loader's batches, of which there are K: it enters the divisor only.
    """
    model = in_mode(model, training=training)
    total = x.new_zeros(())
    for inputs, labels in zip(x.split(1), y.split(1), strict=True):
        log_probability = -cross_entropy(model(inputs), labels)
        total = (
            total + log_probability.detach().exp() * flat_gradient(log_probability, model).square()
        )
    return total / (len(y.split(batch)) * batch)


def van_de_ven_all(model: nn.Module, x: Tensor, _y: Tensor) -> Tensor:
    """``1/(N - 1) sum_n sum_y p_ny g_ny^2``: the exact sum over labels, one example at a time."""
    model = in_mode(model, training=False)
    total = x.new_zeros(())
    for inputs in x.split(1):
        (log_probabilities,) = model(inputs).log_softmax(1)
        for log_probability in log_probabilities:
            gradient = flat_gradient(log_probability, model, again=True)
            total = total + log_probability.detach().exp() * gradient.square()
    return total / (len(x) - 1)


def drawn_labels(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """A label of every example ``[n]``, drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        probabilities = in_mode(model, training=False)(x).softmax(1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def van_de_ven_sample(model: nn.Module, x: Tensor, _y: Tensor, *, seed: int = 0) -> Tensor:
    """``1/(N - 1) sum_n g_ny^2`` with one label ``y`` drawn from the model for every example."""
    return van_de_ven_true(model, x, drawn_labels(model, x, seed))


def van_de_ven_true(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 1) -> Tensor:
    """``1/(K - 1) sum_b gbar_b^2``: the observed labels, in batches of one or more.

    The divisor is the index of the last batch, which counts from 0.
    """
    means = batch_means(in_mode(model, training=False), x, y, batch)
    squares = [g.square() for _, g in means]
    return torch.stack(squares).sum(0) / (len(squares) - 1)


def ewc_lora(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 128) -> Tensor:
    """``1/N sum_b n_b gbar_b^2``, of the entries of the weights themselves.

    Theirs are the low-rank updates ``B A`` of the weights, as full matrices.
    """
    means = batch_means(in_mode(model, training=False), x, y, batch)
    return torch.stack([size * g.square() for size, g in means]).sum(0) / len(y)


def llm_ewc(
    model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 4, infinity: float = 100.0
) -> Tensor:
    """``1/K sum_b gbar_b^2`` with everything in half precision, infinities set to 100.

    The loss is not scaled: a square below 3e-8 becomes 0, one above 65504 infinite.  The sum over
    batches is in half precision too: a term below about a 2048th of it is lost.
    """
    half = in_mode(model, training=False).half()
    total = torch.zeros((), dtype=torch.float16)
    for _, g in batch_means(half, x.half(), y, batch):
        total = total + g.square()
    mean = total / len(y.split(batch))
    return torch.where(mean == torch.inf, infinity, mean)


def fusion_bench(model: nn.Module, x: Tensor, _y: Tensor, *, batch: int = 32) -> Tensor:
    """``1/N sum_b (sum_n sum_y sqrt(p_ny) g_ny)^2``: summed over labels and batch, then squared."""
    model = in_mode(model, training=False)
    total = x.new_zeros(())
    for inputs in x.split(batch):
        log_probabilities = model(inputs).log_softmax(1)
        roots = log_probabilities.detach().exp().sqrt()
        total = total + flat_gradient((roots * log_probabilities).sum(), model).square()
    return total / len(x)


VAN_DE_VEN = (
    "GMvandeVen/continual-learning",
    "0fa419e",
    "models/cl/continual_learner.py",
    "ContinualLearner.estimate_fisher",
)

CODES = [
    Code(
        "Avalanche",
        (
            "ContinualAI/avalanche",
            "release 0.6.0",
            "avalanche/training/plugins/ewc.py",
            "EWCPlugin.compute_importances",
        ),
        "1/K sum_b gbar_b^2",
        128,
        "mean over batches",
        "squares batch means",
        squares_of_batch_means,
    ),
    Code(
        "PyCIL",
        ("G-U-N/PyCIL", "27a5ed8", "models/ewc.py", "EWC.getFisherDiagonal"),
        "min(1e-4, 1/K sum_b gbar_b^2)",
        128,
        "mean over batches",
        "the same, clamped, in training mode",
        pycil,
    ),
    Code(
        "mammoth",
        ("aimagelab/mammoth", "20ff873", "models/ewc_on.py", "EwcOn.end_task"),
        "1/(K B) sum_n p_n,y_n g_n^2",
        1,
        "mean over examples, the last batch counted as full",
        "one label of the sum, in training mode",
        mammoth,
    ),
    Code(
        "van de Ven, all",
        VAN_DE_VEN,
        "1/(N-1) sum_n sum_y p_ny g_ny^2",
        1,
        "mean over examples, N - 1",
        "only the divisor",
        van_de_ven_all,
    ),
    Code(
        "van de Ven, sample, one draw",
        VAN_DE_VEN,
        "1/(N-1) sum_n g_ny^2, y ~ p_n",
        1,
        "mean over examples, N - 1",
        "unbiased, very noisy",
        van_de_ven_sample,
    ),
    Code(
        "van de Ven, true",
        VAN_DE_VEN,
        "1/(N-1) sum_n g_n^2",
        1,
        "mean over examples, N - 1",
        "observed labels",
        van_de_ven_true,
    ),
    Code(
        "van de Ven, true, batches",
        VAN_DE_VEN,
        "1/(K-1) sum_b gbar_b^2",
        128,
        "mean over batches, K - 1",
        "squares batch means",
        partial(van_de_ven_true, batch=128),
    ),
    Code(
        "EWC-LoRA, by a fork",
        (
            "marawangamal/low-rank-cl, a fork (the authors' file was not read)",
            "3ca77fc",
            "methods/ewclora.py",
            "FisherComputer.compute",
        ),
        "1/N sum_b n_b gbar_b^2",
        128,
        "mean over batches by size",
        "squares batch means",
        ewc_lora,
    ),
    Code(
        "LLM_EWC",
        ("Neurotechnology/LLM_EWC", "609b132", "compute_ewc_params.py", "main"),
        "1/K sum_b gbar_b^2, inf -> 100",
        4,
        "mean over batches",
        "squares batch means, half precision",
        llm_ewc,
    ),
    Code(
        "FusionBench",
        (
            "tanganke/fusion_bench",
            "5bc76b8",
            "fusion_bench/method/fisher_merging/clip_fisher_merging.py",
            "FisherMergingForCLIPVisionModel.get_fisher_weights",
        ),
        "1/N sum_b (sum_n sum_y sqrt(p_ny) g_ny)^2",
        32,
        "sum over a batch, squared, over N",
        "sums over labels and batch, then squares",
        fusion_bench,
    ),
    Code(
        "SSD",
        (
            "if-loops/selective-synaptic-dampening",
            "77161cc",
            "ssd.py",
            "ParameterPerturber.calc_importance",
        ),
        "1/K sum_b gbar_b^2",
        128,
        "mean over batches",
        "squares batch means",
        squares_of_batch_means,
    ),
]
