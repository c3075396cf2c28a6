"""What other libraries' Fisher matrices are, in units of ours: measured, as a table.

    python scripts/conventions.py

Every library computes on the same small network and data what its documentation calls the Fisher
information, the GGN or the importances.  The factor is the median over entries of their value over
ours, and the spread how far single entries are from it: a spread of 0 means the same quantity in
other units.  Needs the extra ``bench``.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from ewc import Categorical, Empirical, Exact, Kronecker, fisher_information
from ewc.matrices.layers.kronecker import KroneckerProduct

N, BATCH = 64, 16


def network() -> nn.Sequential:
    """A small MLP with three outputs, in double precision."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    """The examples in batches of a size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


class ObservedProbability(Categorical):
    """The observed label's score, weighted by its probability."""

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The score times the root of the weight, ``[n, c]``."""
        weights = self.log_prob(outputs, targets).exp().sqrt()
        return weights[:, None] * super().score(outputs, targets)


def ours(estimator: Exact | Empirical, likelihood: Categorical | None = None) -> Tensor:
    """Our diagonal."""
    fisher = fisher_information(
        network(), batches(N), likelihood or Categorical(), estimator=estimator
    )
    return torch.cat([entries.flatten() for entries in fisher.diagonal().values()])


def our_product() -> Tensor:
    """Our Kronecker matrix of the first layer's weight, without its bias, as a matrix."""
    model = network()
    fisher = fisher_information(model, batches(N), structure=Kronecker(), parameters=["0.weight"])
    block = fisher.blocks[0]
    assert isinstance(block, KroneckerProduct)
    return block.to_dense().flatten()


def avalanche(size: int) -> Tensor:
    """``EWCPlugin.compute_importances`` over batches of a size."""
    import avalanche.training.plugins.ewc as module

    model = network()
    loader = module.DataLoader
    module.DataLoader = lambda *_, **__: [(x, y, torch.zeros_like(y)) for x, y in batches(size)]
    try:
        importances = module.EWCPlugin(1.0).compute_importances(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            [],
            torch.device("cpu"),
            size,
        )
    finally:
        module.DataLoader = loader
    return torch.cat([value.data.flatten() for value in importances.values()])


def backpack(extension: str, reduction: str) -> Tensor:
    """One backward pass over all examples with an extension."""
    import backpack as library
    from backpack import extensions

    model = library.extend(network())
    loss = library.extend(nn.CrossEntropyLoss(reduction=reduction))
    ((x, y),) = batches(N)
    kind = getattr(extensions, extension)()
    with library.backpack(kind):
        loss(model(x), y).backward()
    results = [getattr(p, kind.savefield) for p in model.parameters()]
    if extension == "KFLR":
        return torch.kron(*results[0]).flatten()
    return torch.cat([entries.flatten() for entries in results])


def nngeometry() -> Tensor:
    """``FIM`` in its diagonal representation."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    ((x, y),) = batches(N)
    model = network().float()
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=BATCH)
    matrix = FIM(model=model, loader=loader, representation=PMatDiag)
    return matrix.get_diag().double()


def laplace(kind: str) -> Tensor:
    """A backend's ``diag`` summed over batches, as its ``fit`` does."""
    from laplace import curvature

    model = deepcopy(network()).float()
    backend = getattr(curvature, kind)(model, "classification")
    total = torch.zeros(())
    for x, y in batches(BATCH):
        model.zero_grad()
        total = total + backend.diag(x.float(), y)[1]
    return total.double()


def mammoth() -> Tensor:
    """The loop of ``EwcOn.end_task`` in mammoth's ``models/ewc_on.py``, repeated."""
    model = network()
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for x, y in batches(1):
        model.zero_grad()
        log_probability = model(x).log_softmax(1)[0, y[0]]
        log_probability.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        total += log_probability.detach().exp() * gradient.square()
    return total / N


def main() -> None:
    """Measure every factor and print the table."""
    exact, empirical, product = ours(Exact()), ours(Empirical()), our_product()
    weighted = ours(Empirical(), ObservedProbability())
    rows: list[tuple[str, str, Tensor, Callable[[], Tensor]]] = [
        ("Avalanche, importances, batch 1", "Empirical, diagonal", empirical, lambda: avalanche(1)),
        (f"the same, batch {BATCH}", "Empirical, diagonal", empirical, lambda: avalanche(BATCH)),
        (
            "BackPACK DiagGGNExact, mean",
            "Exact, diagonal",
            exact,
            lambda: backpack("DiagGGNExact", "mean"),
        ),
        (
            "the same, reduction sum",
            "Exact, diagonal",
            exact,
            lambda: backpack("DiagGGNExact", "sum"),
        ),
        (
            "BackPACK SumGradSquared, mean",
            "Empirical, diagonal",
            empirical,
            lambda: backpack("SumGradSquared", "mean"),
        ),
        (
            "the same, reduction sum",
            "Empirical, diagonal",
            empirical,
            lambda: backpack("SumGradSquared", "sum"),
        ),
        ("BackPACK KFLR, mean", "Exact, Kronecker", product, lambda: backpack("KFLR", "mean")),
        ("nngeometry FIM, PMatDiag", "Exact, diagonal", exact, nngeometry),
        (
            "laplace-torch CurvlinopsGGN.diag",
            "Exact, diagonal",
            exact,
            lambda: laplace("CurvlinopsGGN"),
        ),
        (
            "laplace-torch CurvlinopsEF.diag",
            "Empirical, diagonal",
            empirical,
            lambda: laplace("CurvlinopsEF"),
        ),
        ("mammoth ewc_on", "Empirical, ObservedProbability, diagonal", weighted, mammoth),
        ("the same", "Empirical, diagonal", empirical, mammoth),
    ]
    print(f"N = {N} examples")
    print("| theirs | ours | theirs / ours | spread |")
    print("|---|---|---|---|")
    for name, quantity, expected, compute in rows:
        ratio = compute() / expected
        factor = float(ratio.median())
        spread = float((ratio / factor - 1).abs().quantile(0.9))
        print(f"| {name} | {quantity} | {factor:.4g} | {spread:.1%} |")


if __name__ == "__main__":
    main()
