"""What matrices that are made of matrices share: how they are saved."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ewc.matrices.matrix import FisherMatrix


def joined_states(matrices: Sequence[FisherMatrix]) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors of several matrices, numbered, and their descriptions."""
    tensors, about = {}, []
    for index, matrix in enumerate(matrices):
        inner, description = matrix.description()
        tensors.update({f"{index}/{key}": value for key, value in inner.items()})
        about.append(description)
    return tensors, about


def split_states(tensors: Mapping[str, Tensor], about: Sequence[Any]) -> list[FisherMatrix]:
    """The matrices that :func:`joined_states` described."""
    matrices = []
    for index, description in enumerate(about):
        prefix = f"{index}/"
        inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        matrices.append(FisherMatrix.from_description(inner, description))
    return matrices
