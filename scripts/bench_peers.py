"""The other libraries of ``bench_fisher.py``, behind one method.

Every peer is used as its documentation does, over the same batches, and returns the trace of its
matrix as a mean over examples; where it gives sums, they are divided by the number of examples.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, ClassVar

import torch
from bench_networks import Batches, by_gradients, count_of, labels_of, pieces, plain_parameters
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader


def mean_trace(totals: Iterable[Tensor], batches: Batches) -> float:
    """The trace of a diagonal that was summed over examples, as a mean."""
    return sum(float(total.sum()) for total in totals) / count_of(batches)


def trace_of_products(blocks: Iterable[Sequence[Tensor]]) -> float:
    """The trace of Kronecker products of one or two factors each."""
    return sum(float(b[0].trace() * (b[1].trace() if len(b) > 1 else 1.0)) for b in blocks)


class Peer:
    """Another way to a Fisher matrix.

    Args:
        model: the network; the peer works on a copy.

    Attributes:
        name: its column.
        comparable: whether it is the quantity of its row.
        partial: whether its Kronecker matrix is over :func:`plain_parameters` alone.
    """

    name: ClassVar[str]
    comparable: ClassVar[bool] = True
    partial: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.original = model

    @cached_property
    def model(self) -> nn.Module:
        """The copy."""
        return deepcopy(self.original)

    def cut(self, structure: str, estimator: str, batches: Batches) -> Batches:
        """The examples as the peer takes them, where whole batches are too much for it."""
        return batches

    def trace(self, structure: str, estimator: str, batches: Batches) -> float:
        """The matrix and its trace.

        Raises:
            NotImplementedError: the peer has none of this kind.
        """
        if structure == "diagonal":
            return self._diagonal(estimator, batches)
        return self._kronecker(estimator, batches)

    def _diagonal(self, estimator: str, batches: Batches) -> float:
        raise NotImplementedError("no diagonal but randomised estimates of it")

    def _kronecker(self, estimator: str, batches: Batches) -> float:
        raise NotImplementedError("diagonal only")


class BackPACK(Peer):
    """BackPACK's own extensions, one backward pass per batch."""

    name = "BackPACK"

    @cached_property
    def model(self) -> nn.Module:
        """A copy with sums and reshapes as modules."""
        from backpack import extend

        if any(isinstance(module, nn.LayerNorm) for module in self.original.modules()):
            raise NotImplementedError("no rule for LayerNorm")
        convert = not isinstance(self.original, nn.Sequential)
        return extend(deepcopy(self.original), use_converter=convert).eval()

    def _quantities(self, extension: Any, x: Tensor, y: Tensor) -> list[Any]:
        from backpack import backpack, extend

        loss = extend(nn.CrossEntropyLoss(reduction="sum"))
        self.model.zero_grad()
        with backpack(extension):
            loss(self.model(x), y).backward()
        return [getattr(p, extension.savefield) for p in self.model.parameters()]

    def _diagonal(self, estimator: str, batches: Batches) -> float:
        from backpack.extensions import DiagGGNExact, DiagGGNMC, SumGradSquared

        extension = {
            "exact": DiagGGNExact(),
            "Monte Carlo": DiagGGNMC(mc_samples=1),
            "empirical": SumGradSquared(),
        }[estimator]
        totals = [torch.zeros_like(p) for p in self.model.parameters()]
        for x, y in batches:
            torch._foreach_add_(totals, self._quantities(extension, x, y))
        return mean_trace(totals, batches)

    def _kronecker(self, estimator: str, batches: Batches) -> float:
        from backpack.extensions import KFAC, KFLR

        if estimator == "empirical":
            raise NotImplementedError("no empirical Kronecker factors")
        extension = KFLR() if estimator == "exact" else KFAC(mc_samples=1)
        totals: list[list[Tensor]] = []
        for x, y in batches:
            blocks = self._quantities(extension, x, y)
            totals = totals or [[torch.zeros_like(factor) for factor in b] for b in blocks]
            for total, block in zip(totals, blocks, strict=True):
                # Of the gradients, sums over examples; of the inputs, means.
                total[0].add_(block[0], alpha=1 / count_of(batches))
                if len(block) > 1:
                    total[1].add_(block[1], alpha=len(y) / count_of(batches))
        return trace_of_products(totals)


class NNGeometry(Peer):
    """nngeometry; the empirical matrices by its generator with a function of our own."""

    name = "nngeometry"
    partial = True

    def trace(self, structure: str, estimator: str, batches: Batches) -> float:
        """``PMatDiag`` or ``PMatKFAC``."""
        from nngeometry.backend import TorchHooksJacobianBackend
        from nngeometry.layercollection import LayerCollection
        from nngeometry.metrics import FIM, FIM_MonteCarlo
        from nngeometry.object import PMatDiag, PMatKFAC

        form, layers = PMatKFAC, LayerCollection()
        if structure == "diagonal":
            form, layers = PMatDiag, LayerCollection.from_model(self.model)
        else:
            for name in dict.fromkeys(n.rpartition(".")[0] for n in plain_parameters(self.model)):
                layers.add_layer_from_model(self.model, self.model.get_submodule(name))
        # It reads a DataLoader: one that cuts whole batches costs next to nothing.
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        places, size = range(len(y)), len(batches[0][1])
        loader = DataLoader(places, batch_size=size, collate_fn=lambda rows: (x[rows], y[rows]))
        shared = {"model": self.model, "layer_collection": layers}
        if estimator != "empirical":
            make = FIM if estimator == "exact" else FIM_MonteCarlo
            return float(make(loader=loader, representation=form, **shared).trace())

        def observed(x: Tensor, y: Tensor) -> Tensor:
            return self.model(x).log_softmax(1).gather(1, y[:, None])

        generator = TorchHooksJacobianBackend(function=observed, **shared)
        return float(form(generator=generator, examples=loader).trace())


class Curvlinops(Peer):
    """The factors of ``KFACLinearOperator``; its diagonals are estimates with random vectors."""

    name = "curvlinops"
    partial = True

    def _kronecker(self, estimator: str, batches: Batches) -> float:
        from curvlinops import KFACLinearOperator

        operator = KFACLinearOperator(
            self.model,
            nn.CrossEntropyLoss(),
            list(plain_parameters(self.model).values()),
            batches,
            fisher_type={"exact": "type-2", "Monte Carlo": "mc"}.get(estimator, estimator),
            check_deterministic=False,
            separate_weight_and_bias=False,
            num_per_example_loss_terms=1,
            num_data=count_of(batches),
        )
        operator.compute_kronecker_factors()
        return float(operator.trace)


class Laplace(Peer):
    """laplace-torch's default backend, summed over batches as its ``fit`` does."""

    name = "Laplace: curvlinops"
    partial = True
    kind = "Curvlinops"

    def cut(self, structure: str, estimator: str, batches: Batches) -> Batches:
        """Whole Jacobians, which this backend makes, are made fastest one by one."""
        if structure != "diagonal" or self.kind != "Curvlinops":
            return batches
        return by_gradients(batches, self.model) if estimator == "empirical" else pieces(batches, 1)

    def _backend(self, estimator: str) -> Any:
        from laplace import curvature

        if estimator == "empirical":
            return getattr(curvature, f"{self.kind}EF")(self.model, "classification")
        options = {"stochastic": estimator == "Monte Carlo"}
        return getattr(curvature, f"{self.kind}GGN")(self.model, "classification", **options)

    def _diagonal(self, estimator: str, batches: Batches) -> float:
        backend = self._backend(estimator)
        total = torch.zeros(())
        for x, y in batches:
            self.model.zero_grad()
            total = total + backend.diag(x, y)[1]
        return mean_trace([total], batches)

    def _kronecker(self, estimator: str, batches: Batches) -> float:
        chosen = plain_parameters(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self.partial or name in chosen)
        total: Any = None
        try:
            backend = self._backend(estimator)
            for x, y in batches:
                self.model.zero_grad()
                factors = backend.kron(x, y, N=count_of(batches))[1]
                total = factors if total is None else total + factors
        finally:
            self.model.requires_grad_(True)
        return trace_of_products(total.kfacs) / count_of(batches)


class LaplaceBackPACK(Laplace):
    """laplace-torch's other backend."""

    name = "Laplace: BackPACK"
    partial = False
    kind = "BackPack"
    model = BackPACK.model


class PerSample(Peer):
    """``vmap(grad)`` of ``torch.func``; exactly: a class at a time, weighted by probability."""

    name = "torch.func"

    def cut(self, structure: str, estimator: str, batches: Batches) -> Batches:
        """So many that the gradients are not too large."""
        return by_gradients(batches, self.model)

    def _diagonal(self, estimator: str, batches: Batches) -> float:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = torch.func.functional_call(self.model, (values, buffers), (x[None],))
            return functional.cross_entropy(outputs, y[None])

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, y in batches:
            with torch.no_grad():
                chosen = labels_of(estimator, self.model(x), y)
            for labels, weights in chosen:
                for name, gradient in gradients(parameters, x, labels).items():
                    totals[name] += torch.tensordot(weights, gradient.square_(), 1)
        return mean_trace(totals.values(), batches)


class Loop(Peer):
    """One example and one class at a time, as exact reference code does it."""

    name = "loop"

    def cut(self, structure: str, estimator: str, batches: Batches) -> Batches:
        """Twenty examples, one by one."""
        return pieces(batches, 1)[:20]

    def _diagonal(self, estimator: str, batches: Batches) -> float:
        parameters = list(self.model.parameters())
        totals = [torch.zeros_like(p) for p in parameters]
        for x, y in batches:
            outputs = self.model(x)
            chosen = labels_of(estimator, outputs.detach(), y)
            for number, (labels, weights) in enumerate(chosen, 1):
                loss = functional.cross_entropy(outputs, labels)
                more = number < len(chosen)
                for total, gradient in zip(
                    totals, torch.autograd.grad(loss, parameters, retain_graph=more), strict=True
                ):
                    total.addcmul_(gradient, gradient, value=float(weights))
        return mean_trace(totals, batches)


class Avalanche(Peer):
    """``EWCPlugin.compute_importances``: squared gradients of batch means."""

    name = "Avalanche"
    comparable = False

    def _diagonal(self, estimator: str, batches: Batches) -> float:
        import avalanche.training.plugins.ewc as module

        if estimator != "empirical":
            raise NotImplementedError("observed labels only")
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        # Its own code, over batches that are already tensors.
        loader = module.DataLoader
        module.DataLoader = lambda *_, **__: [(x, y, torch.zeros_like(y)) for x, y in batches]
        try:
            importances = module.EWCPlugin(1.0).compute_importances(
                self.model, nn.CrossEntropyLoss(), optimizer, [], torch.device("cpu"), 1
            )
        finally:
            module.DataLoader = loader
        return sum(float(value.data.sum()) for value in importances.values())


PEERS = (BackPACK, NNGeometry, Curvlinops, Laplace, LaplaceBackPACK, PerSample, Loop, Avalanche)
