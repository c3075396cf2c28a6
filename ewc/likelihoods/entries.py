"""What likelihoods of independent outputs share: each entry of the outputs has one target."""

import torch
from torch import Tensor


def check_shape(
    outputs: Tensor, targets: Tensor, name: str, of: str = "the outputs' shape"
) -> None:
    """Check for targets of the outputs' shape.

    Raises:
        ValueError: the targets have another shape; the message says how to give them.
    """
    if targets.shape == outputs.shape:
        return
    fix = ""
    if [*targets.shape, 1] == list(outputs.shape):
        fix = "; give y[:, None]" if targets.dim() == 1 else "; give y[..., None]"
    elif list(targets.shape) == [*outputs.shape, 1]:
        fix = "; give y[..., 0]"
    raise ValueError(
        f"Targets of the {name} likelihood must have {of} {list(outputs.shape)}, got "
        f"{list(targets.shape)}{fix}."
    )


def along_axes(lengths: Tensor) -> Tensor:
    """One vector for every output, along its axis: ``[c, n, ...]`` for lengths ``[n, ...]``."""
    shape = lengths.shape[1:]
    vectors = torch.diag_embed(lengths.reshape(len(lengths), shape.numel()))
    return vectors.transpose(0, 1).reshape(-1, len(lengths), *shape)


def uniform(outputs: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Uniform random numbers on the CPU, ``[n, num_samples, ...]`` for outputs ``[n, ...]``.

    The examples come first: other batches of the same data get the same numbers.
    """
    shape = outputs.shape[0], num_samples, *outputs.shape[1:]
    return torch.rand(shape, generator=generator, dtype=torch.float64)
