"""Products with the Fisher information of a network, by differentiating it."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from ewc.fisher.faults import check_finite
from ewc.fisher.implicit.pieces import Piece
from ewc.linalg.tiles import DEFAULT_MEMORY
from ewc.parameters import Parameters, accumulation_dtype
from ewc.pullback.agreement import agree, margin, rounding
from ewc.pullback.graph import Graph
from ewc.pullback.per_example import UNSUPPORTED, chosen_parameters
from ewc.pullback.pullback import Pullback
from ewc.pullback.tape import KnownGraphs, Tape

_log = logging.getLogger(__name__)


class NetworkProduct:
    """The product of a matrix-free Fisher with a vector, one piece of the data at a time.

    Args:
        model: a copy of the network in evaluation mode, whose other parameters are frozen.
        names: the parameters that the products are over.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.parameters = chosen_parameters(model, names)
        # Otherwise the graphs would include the other parameters.
        chosen = {id(parameter) for parameter in self.parameters.values()}
        for parameter in model.parameters():
            if id(parameter) not in chosen:
                parameter.requires_grad_(False)
        self.dtype = accumulation_dtype(self.parameters[names[0]].dtype)
        self._seen = KnownGraphs()
        self._differentiates = True
        self._checked: set[int] = set()

    def product(self, piece: Piece, direction: Parameters) -> Parameters:
        r"""The product :math:`\sum_n J_n^\top \sum_k s_{kn} (s_{kn}^\top J_n v)` over one piece.

        Args:
            piece: the examples.
            direction: ``v``.
        """
        if (derivative := self._derivative(piece, direction)) is None:
            return self._combination(piece, direction)
        pull, moved = derivative
        along = torch.einsum("kn...,n...->kn", piece.scores, moved)
        (pulled,) = pull(torch.einsum("kn,kn...->n...", along, piece.scores))
        result: Parameters = pulled
        return result

    def along(self, piece: Piece, direction: Parameters) -> Tensor:
        r"""The products :math:`s_{kn}^\top J_n v` over one piece, ``[k, n]``.

        Args:
            piece: the examples.
            direction: ``v``.
        """
        if (derivative := self._derivative(piece, direction)) is not None:
            return torch.einsum("kn...,n...->kn", piece.scores, derivative[1])
        directions = {name: d[None].to(self.dtype) for name, d in direction.items()}
        sums = [
            sum(pullback.project(directions)[..., 0] for pullback in pullbacks)
            for pullbacks in self.pullbacks(piece)
        ]
        # The sum over no pullback is the number 0.
        products = [total for total in sums if isinstance(total, Tensor)]
        return torch.cat(products) if products else piece.scores.new_zeros(piece.scores.shape[:2])

    def _combination(self, piece: Piece, direction: Parameters) -> Parameters:
        """The product from the pulled-back vectors, by one pass per score vector."""
        total = {name: torch.zeros_like(d, dtype=self.dtype)[None] for name, d in direction.items()}
        directions = {name: d[None].to(self.dtype) for name, d in direction.items()}
        for pullbacks in self.pullbacks(piece):
            along = sum(pullback.project(directions) for pullback in pullbacks)
            if isinstance(along, Tensor):
                for pullback in pullbacks:
                    pullback.add_combinations(along, total)
        return {name: tensor[0] for name, tensor in total.items()}

    def pullbacks(self, piece: Piece) -> Iterator[Sequence[Pullback]]:
        """The score vectors of one piece pulled back; see :class:`~ewc.pullback.tape.Tape`."""
        with torch.enable_grad():
            outputs = piece.arguments(self.model)
        if outputs.requires_grad and len(piece.scores):
            with torch.no_grad():
                tape = Tape(self.model, self.parameters, piece.arguments, outputs, self._seen)
                yield from tape.pullbacks(piece.scores, len(piece.scores), DEFAULT_MEMORY)

    def _derivative(
        self, piece: Piece, direction: Parameters
    ) -> tuple[Callable[[Tensor], Any], Tensor] | None:
        """The backward derivative, and the forward derivative of the outputs, ``[n, ...]``.

        ``None`` if the network does not have both.  Some operations lack one, and some have
        wrong ones: a compiled module ignores the parameters that it is called with.
        """
        if not (self._differentiates and len(piece.scores)):
            return None
        try:
            pull, moved = self._moved(piece, direction)
            if id(piece) in self._checked or self._right(piece, direction, pull, moved):
                self._checked.add(id(piece))
                return pull, moved
            error: Exception | None = None
        except UNSUPPORTED as caught:
            # Custom autograd functions, in-place writes and the like.  An error of the network
            # itself is raised again when vectors are pulled back.
            error = caught
        _log.info("products by pulled-back vectors: %s", error or "wrong derivatives")
        self._differentiates = False
        return None

    def _right(
        self, piece: Piece, direction: Parameters, pull: Callable[[Tensor], Any], moved: Tensor
    ) -> bool:
        """Whether both derivatives agree with one plain backward pass of all examples.

        Raises:
            FloatingPointError: a derivative is not finite.
        """
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(piece.scores.shape[:2], generator=generator).to(piece.scores)
        score = torch.einsum("kn,kn...->n...", weights, piece.scores)
        with torch.enable_grad():
            outputs = piece.arguments(self.model)
        if not outputs.requires_grad:
            return not moved.any()
        if len(outputs) > 1 and Graph(outputs).counts_words():
            return False
        plain = torch.autograd.grad(
            outputs, list(self.parameters.values()), score, allow_unused=True
        )
        (pulled,) = pull(score)
        along = size = 0.0
        for (name, vector), gradient in zip(pulled.items(), plain, strict=True):
            expected = torch.zeros_like(vector) if gradient is None else gradient
            expected = expected.to_dense() if expected.is_sparse else expected
            check_finite({name: expected})
            if not agree(vector, expected):
                return False
            along += float((expected * direction[name]).sum())
            size += float(expected.norm() * direction[name].norm())
        gap = abs(float((score * moved).sum()) - along)
        return gap <= margin(moved.dtype) * abs(along) + rounding(moved.dtype) * size

    def _moved(self, piece: Piece, direction: Parameters) -> tuple[Any, Tensor]:
        """The backward derivative, and the outputs' derivative in a direction, ``[n, ...]``."""
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        direction = {name: d.to(parameters[name]) for name, d in direction.items()}

        def outputs(values: Parameters) -> Tensor:
            return piece.arguments.called(self.model, values)

        _, pull, *_ = vjp(outputs, parameters)
        try:
            # Pulling back is linear in the score, so its derivative is the product with the
            # same Jacobian.  torch's forward derivatives are not always that: they move the
            # padding of an embedding.
            _, push, *_ = vjp(pull, torch.zeros_like(piece.scores[0]))
            (moved,) = push((direction,))
        except UNSUPPORTED:
            with warnings.catch_warnings():
                # torch's rules for forward derivatives use deprecated functions of torch.
                warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
                _, moved, *_ = jvp(outputs, (parameters,), (direction,))
        return pull, moved
