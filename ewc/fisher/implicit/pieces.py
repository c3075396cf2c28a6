"""The data that a matrix-free Fisher stores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ewc.checks import check_instance
from ewc.pullback.arguments import Arguments
from ewc.pullback.call import Call


@dataclass(frozen=True)
class Piece:
    """A set of examples.

    Attributes:
        arguments: the network's call.
        scores: the score vectors, ``[k, n, ...]``.
    """

    arguments: Call
    scores: Tensor


def described(pieces: Sequence[Piece]) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors of all pieces by name, and a JSON description of the calls.

    Raises:
        TypeError: a call is not one of the model, but of a function of it.
    """
    tensors, calls = {}, []
    for index, piece in enumerate(pieces):
        if not isinstance(piece.arguments, Arguments):
            raise TypeError(
                "A matrix-free Fisher of Empirical(loss=...) cannot be saved, because a file "
                "cannot hold the function: take another structure, such as LowRank()."
            )
        tensors[f"scores/{index}"] = piece.scores
        inputs = piece.arguments.tensors()
        tensors |= {f"arguments/{index}/{place}": t for place, t in enumerate(inputs)}
        keys = [None if isinstance(v, Tensor) else list(v) for v in piece.arguments.positional]
        calls.append({"positional": keys, "named": list(piece.arguments.named)})
    return tensors, calls


def from_description(tensors: Mapping[str, Tensor], calls: Sequence[Any]) -> list[Piece]:
    """The pieces of a description by :func:`described`.

    Raises:
        ValueError: the tensors are not those of the description.
        TypeError: an entry of the description has the wrong type.
    """
    pieces: list[Piece] = []
    for index, call in enumerate(calls):
        for keys in [call["positional"], call["named"], *filter(None, call["positional"])]:
            check_instance(keys, list, "an entry of a call", "a list")
        for key in [
            *call["named"],
            *(key for keys in filter(None, call["positional"]) for key in keys),
        ]:
            check_instance(key, str, "the name of an argument", "text")
        positional = tuple(
            torch.empty(0) if keys is None else dict.fromkeys(keys, torch.empty(0))
            for keys in call["positional"]
        )
        empty = Arguments(positional, dict.fromkeys(call["named"], torch.empty(0)))
        count = len(empty.tensors())
        arguments = empty.with_tensors(
            [tensors[f"arguments/{index}/{place}"] for place in range(count)]
        )
        scores = tensors[f"scores/{index}"]
        if not scores.is_floating_point() or scores.shape[1:2] != (len(arguments),):
            raise ValueError(
                f"The score vectors must be floating-point numbers [k, {len(arguments)}, ...], got "
                f"{scores.dtype} of shape {list(scores.shape)}."
            )
        pieces.append(Piece(arguments, scores))
    if missing := described(pieces)[0].keys() ^ {
        key for key in tensors if key.startswith(("scores/", "arguments/"))
    }:
        raise ValueError(
            f"Tensor {min(missing)!r} is in only one of the file and its description of the "
            "network's calls: they must have the same tensors."
        )
    return pieces
