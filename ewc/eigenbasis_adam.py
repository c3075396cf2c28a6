r"""Adam along the eigenvectors of a Kronecker-factored Fisher matrix.

Adam scales every coordinate by itself.  A K-FAC penalty is a quadratic with eigenvalues over
many orders of magnitude whose axes are no coordinates: Adam sees an ill-conditioned problem,
and a task of some thousand steps ends far from where loss and penalty balance.  Along the
penalty's own eigenvectors the quadratic is diagonal, and what Adam does fits.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewc.checks import check_not_negative, is_number
from ewc.matrices.block_diagonal import BlockDiagonalFisher
from ewc.matrices.layers.eigenvalue_corrected import EigenvalueCorrectedProduct
from ewc.matrices.layers.kronecker import KroneckerProduct
from ewc.matrices.matrix import FisherMatrix
from ewc.optimizer_state import parameters_of, restore_types
from ewc.wrappers import named_parameters


class EigenbasisAdam(Optimizer):
    r"""Adam (Kingma & Ba 2015) in the eigenbasis of a Fisher matrix.

    For a layer with :math:`F = (Q_G \otimes Q_A)\, \mathrm{diag}(S)\, (Q_G \otimes Q_A)^\top`
    the gradient :math:`\nabla W` becomes :math:`Q_G^\top \nabla W Q_A`, both moments are those
    of its entries, and the step is turned back.  As the second moments of gradients along the
    Kronecker eigenvectors are the eigenvalues of EKFAC, this is EKFAC with running averages
    (George et al. 2018, arXiv:1806.03884, section 3.3) with Adam's square root and momentum.

    With a penalty of Kronecker structure, the penalty's own matrix::

        optimizer = EigenbasisAdam(model.parameters(), lr=1e-3)
        for task in tasks:
            if penalty.terms:
                optimizer.rotate(penalty.terms[-1].precision, model)
            ...  # steps on the loss with the penalty
            penalty.consolidate(fisher, model)

    (:class:`ewc.plugin.EWCPlugin` does it by itself).  Before :meth:`rotate`, and for
    parameters that have no Kronecker block, it is plain Adam.  A layer of ``o`` outputs and
    ``i`` inputs costs :math:`4 o i (o + i)` operations a step more than with plain Adam: less
    than the network's own for small layers and large batches, several times as much for wide
    layers.  Moments are forgotten when the basis changes; a ``state_dict`` holds both.

    Args:
        params: parameters, or groups of them; a layer whose weight and bias are in different
            groups keeps its coordinates.
        lr: the learning rate.
        betas: the decay of the first and of the second moment, in [0, 1).
        eps: what keeps the root from 0.
        weight_decay: :math:`w`, the gradient of :math:`\tfrac w2 |\theta|^2`.

    Raises:
        ValueError: an option is outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check_not_negative(value, name)
        if len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas!r}: both must lie in [0, 1).")
        self._bases: dict[Tensor, tuple[EigenvalueCorrectedProduct, list[Tensor]]] = {}
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def rotate(self, fisher: FisherMatrix, model: nn.Module) -> None:
        """Go on along the eigenvectors of a matrix, with fresh moments.

        Args:
            fisher: with blocks of Kronecker or EKFAC form, of any scale; the others'
                parameters keep their coordinates.
            model: whose parameters' names are those of the matrix.
        """
        self.state.clear()
        self._bases = {}
        named = dict(named_parameters(model))
        groups = [set(group["params"]) for group in self.param_groups]
        for block in fisher.blocks if isinstance(fisher, BlockDiagonalFisher) else []:
            basis = block.eigen if isinstance(block, KroneckerProduct) else block
            members: list[Tensor] = [named[name] for name in block.shapes if name in named]
            fits = [p.shape for p in members] == list(block.shapes.values())
            together = any(group.issuperset(members) for group in groups)
            if isinstance(basis, EigenvalueCorrectedProduct) and fits and together:
                self._bases |= dict.fromkeys(members, (basis, members))

    def state_dict(self) -> dict[str, Any]:
        """What every optimizer has, with the bases.

        Tensors and plain values, which ``torch.load`` takes with ``weights_only=True``.
        """
        numbers = {parameter: number for number, parameter in enumerate(parameters_of(self))}
        bases = []
        for first, (basis, members) in self._bases.items():
            if first is members[0]:
                tensors, about = basis.description()
                places = [numbers[member] for member in members]
                bases.append({"parameters": places, "tensors": tensors, "about": about})
        return {**super().state_dict(), "bases": bases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the optimizer whose ``state_dict`` it is would have gone on.

        Raises:
            ValueError: the state does not fit; the optimizer is then as it was.
        """
        own = parameters_of(self)
        bases: dict[Tensor, tuple[EigenvalueCorrectedProduct, list[Tensor]]] = {}
        for saved in state_dict.get("bases", []):
            basis = FisherMatrix.from_description(saved["tensors"], saved["about"])
            members = [own[number] for number in saved["parameters"] if number < len(own)]
            fits = [p.shape for p in members] == list(basis.shapes.values())
            if not (fits and isinstance(basis, EigenvalueCorrectedProduct)):
                raise ValueError(
                    f"The saved basis of {', '.join(basis.shapes)} does not fit the optimizer's "
                    "parameters: they must be those of the saved one, in the same order."
                )
            bases |= dict.fromkeys(members, (basis.to(members[0].device), members))
        super().load_state_dict(state_dict)
        restore_types(self, state_dict)
        if "bases" in state_dict:  # which states of earlier versions have not
            self._bases = bases

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: with the bases."""
        return {**super().__getstate__(), "_bases": self._bases}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: computes the loss and its gradients, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            done: set[Tensor] = set()
            for parameter in group["params"]:
                if parameter in done:
                    continue
                basis, members = self._bases.get(parameter, (None, [parameter]))
                done.update(members)
                if any(member.grad is not None and member.requires_grad for member in members):
                    self._move(basis, members, group)
        return loss

    def _move(
        self,
        basis: EigenvalueCorrectedProduct | None,
        members: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        """Adam's step of one parameter, or of a layer's in its eigenbasis."""
        gradients = []
        for member in members:
            # A frozen member stays, although a gradient may be left of before.
            free = member.requires_grad
            gradient = member.grad if free and member.grad is not None else torch.zeros_like(member)
            if free and group["weight_decay"]:
                gradient = gradient.add(member, alpha=group["weight_decay"])
            gradients.append(gradient)
        if basis is None:
            coordinates = gradients[0]
        else:
            named = dict(zip(basis.shapes, gradients, strict=True))
            coordinates = basis.rotated(basis.weights.to_matrix(named).to(basis.dtype))
        moved = self._adam(self.state[members[0]], coordinates, group)
        if basis is None:
            steps = [moved]
        else:
            turned = basis.weights.to_parameters(basis.rotated_back(moved))
            steps = [turned[name] for name in basis.shapes]
        for parameter, step in zip(members, steps, strict=True):
            if parameter.requires_grad:
                parameter.sub_(step.to(parameter.dtype), alpha=group["lr"])

    @staticmethod
    def _adam(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        r"""The direction :math:`\hat m / (\sqrt{\hat v} + \epsilon)`, the moments moved on."""
        first, second = group["betas"]
        if not state:
            state |= {
                "step": 0,
                "exp_avg": torch.zeros_like(gradient),
                "exp_avg_sq": torch.zeros_like(gradient),
            }
        state["step"] += 1
        mean: Tensor = state["exp_avg"].lerp_(gradient, 1 - first)
        square: Tensor = (
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        )
        root = square.sqrt().div_(math.sqrt(1 - second ** state["step"])).add_(group["eps"])
        return (mean / root).div_(1 - first ** state["step"])
