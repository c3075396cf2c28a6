"""What public codes and other libraries compute as the Fisher information, beside the exact one.

    python scripts/conventions.py

Its tables are those of docs/conventions.md.  Eight public codes take a small convolutional
network and scikit-learn's digits, untrained and trained.  Avalanche's own code runs, the others are
restated in ``public_codes.py``.  This needs the extra ``experiments``.  The last table is of
BackPACK, nngeometry and laplace-torch.  It needs the extra ``bench``, or is left out.
"""

from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from public_codes import (
    CODES,
    Diagonal,
    batch_means,
    drawn_labels,
    fusion_bench,
    llm_ewc,
    mammoth,
    squares_of_batch_means,
)
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ewc import Empirical, Kronecker, MonteCarlo, fisher_information
from ewc.matrices.layers.kronecker import KroneckerProduct

N = 500
FIRST_LAYER = 72  # parameters of the convolution
SEEDS = 100  # draws of labels
LLM_EWC_BATCHES = 3511  # 14,042 questions in batches of 4


def digits() -> tuple[Tensor, Tensor]:
    """N handwritten digits ``[N, 1, 8, 8]`` with pixels in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:N]
    return torch.tensor(data.images[chosen])[:, None] / 16, torch.tensor(data.target[chosen])


def untrained(x: Tensor) -> nn.Sequential:
    """A convolutional network with random weights, and the data's BatchNorm statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 10),
    ).double()
    for _ in range(20):
        for inputs in x.split(125):
            model(inputs)
    return model.eval()


def trained(x: Tensor, y: Tensor) -> nn.Sequential:
    """The network after training until it is nearly certain of every label."""
    model = untrained(x).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        for chosen in torch.randperm(N, generator=generator).split(125):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval()


def flat(diagonal: dict[str, Tensor]) -> Tensor:
    """All entries as one vector ``[p]``."""
    return torch.cat([entries.flatten() for entries in diagonal.values()])


def exact_diagonal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``1/N sum_n sum_y p_ny g_ny^2``, ``[p]``."""
    return flat(fisher_information(model, [(x, y)]).diagonal())


def avalanche(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 128) -> Tensor:
    """``EWCPlugin.compute_importances`` itself."""
    from avalanche.training.plugins import EWCPlugin
    from torch.utils.data import TensorDataset

    model = deepcopy(model)
    importances = EWCPlugin(1.0).compute_importances(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(x, y, torch.zeros_like(y)),
        torch.device("cpu"),
        batch,
    )
    return flat({name: value.data for name, value in importances.items()})


@dataclass(frozen=True)
class Comparison:
    """Theirs beside the exact diagonal, over the entries that are not 0 there.

    ``factor`` is the median of theirs / exact, ``low`` and ``high`` its deciles 1 and 9,
    ``rank`` Spearman's correlation.
    """

    trace: float
    factor: float
    low: float
    high: float
    rank: float

    @classmethod
    def of(cls, theirs: Tensor, exact: Tensor) -> "Comparison":
        """Compare two diagonals."""
        theirs = theirs.double()
        ratio = (theirs / exact)[exact > 0]
        low, factor, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=ratio.dtype))
        rank = float(spearmanr(theirs, exact).statistic)
        return cls(float(theirs.sum()), float(factor), float(low), float(high), rank)

    def cells(self) -> str:
        """The numbers as cells of a table."""
        return (
            f"{short(self.trace)} | {short(self.factor)} | {short(self.low)} to {short(self.high)}"
            f" | {self.rank:.2f}"
        )


def short(number: float) -> str:
    """Three digits."""
    return f"{number:.3g}".replace("e-0", "e-").replace("e+0", "e")


def formulas() -> list[str]:
    """The table of formulas, a line each."""
    lines = [
        "| code | formula | batch | mean or sum | what differs |",
        "|---|---|---|---|---|",
        "| exact | `1/N sum_n sum_y p_ny g_ny^2` | any | mean over examples | |",
    ]
    for code in CODES:
        cells = [code.name, f"`{code.formula}`", str(code.batch), code.normalisation, code.differs]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sources() -> list[str]:
    """The table of what was read, a line each."""
    lines = ["| code | repository | commit | file | function |", "|---|---|---|---|---|"]
    for code in CODES:
        repository, commit, file, function = code.source
        name = code.name.split(",", maxsplit=1)[0]
        line = f"| {name} | {repository} | {commit} | `{file}` | `{function}` |"
        lines += [line] if line not in lines else []
    return lines


def diagonals(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The exact diagonal and those of the codes, by name."""
    exact = {"exact": exact_diagonal(model, x, y)}
    return exact | {
        code.name: (avalanche if code.name == "Avalanche" else code.diagonal)(model, x, y)
        for code in CODES
    }


def numbers(results: dict[str, Tensor]) -> list[str]:
    """The table of one state of the network, a line each."""
    lines = [
        "| code | trace | theirs / exact | of 80 % of entries | rank correlation |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {Comparison.of(theirs, results['exact']).cells()} |"
        for name, theirs in results.items()
    ]


def rescaled(model: nn.Module, factor: float) -> nn.Module:
    """The network that takes inputs ``factor`` times larger to the same outputs."""
    model = deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).div_(factor)
    return model


def importance_of_few(
    diagonal: Diagonal, model: nn.Module, x: Tensor, y: Tensor, *, size: int
) -> float:
    """The mean diagonal of ``size`` examples over that of all, as a median over entries.

    They are every group of this size in turn, so that a mean over examples gives 1.
    """
    groups = list(zip(x.split(size), y.split(size), strict=True))[: len(x) // size]
    few = torch.stack([diagonal(model, inputs, labels) for inputs, labels in groups]).mean(0)
    inputs, labels = (torch.cat(parts) for parts in zip(*groups, strict=True))
    return float((few / diagonal(model, inputs, labels)).median())


def traces_of_sampled_labels(model: nn.Module, x: Tensor) -> Tensor:
    """The trace of ``van_de_ven_sample`` with every seed, ``[SEEDS]``.

    It draws from the squares ``|g_ny|^2`` of all labels, so that they are computed once.
    """
    squares = torch.stack(
        [
            torch.stack([g.square().sum() for _, g in batch_means(model, x, label, 1)])
            for label in torch.arange(model(x).shape[1])[:, None].expand(-1, len(x))
        ],
        dim=1,
    )
    drawn = torch.stack([drawn_labels(model, x, seed) for seed in range(SEEDS)])
    return squares.gather(1, drawn.T).sum(0) / (len(x) - 1)


def traces_of_monte_carlo(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The trace with our ``MonteCarlo(1)`` with every seed, ``[SEEDS]``."""
    fishers = [
        fisher_information(model, [(x, y)], estimator=MonteCarlo(1, seed=seed))
        for seed in range(SEEDS)
    ]
    return torch.stack([flat(fisher.diagonal()).sum() for fisher in fishers])


def equal_terms_summed(terms: int) -> Tensor:
    """Which of equal terms a running sum in half precision takes, ``[terms]``."""
    total, taken = torch.zeros((), dtype=torch.float16), []
    for _ in range(terms):
        taken.append(total + 1 > total)
        total = total + 1
    return torch.stack(taken)


def faults(results: dict[str, Tensor], model: nn.Module, x: Tensor, y: Tensor) -> dict[str, str]:
    """What the factors alone do not show, as numbers by name."""
    exact = results["exact"]
    evaluated = mammoth(model, x, y, training=False)
    single = Comparison.of(fusion_bench(model, x, y, batch=1), exact)
    large, inputs = rescaled(model, 1024), 1024 * x
    halved, values = llm_ewc(large, inputs, y), exact_diagonal(large, inputs, y)
    ratio = halved / values  # nan where both are 0
    first, others = slice(FIRST_LAYER), slice(FIRST_LAYER, None)
    drawn = torch.stack([drawn_labels(model, x, seed) for seed in range(SEEDS)])
    likely_only = (drawn == model(x).argmax(1)).all(1)
    few = {
        f"SSD, {size} random examples / all, {name}": short(
            importance_of_few(diagonal, model, x, y, size=size)
        )
        for size in (100, 83, 32)
        for name, diagonal in (("theirs", squares_of_batch_means), ("exact", exact_diagonal))
    }
    return {
        "exact entries above PyCIL's clamp": share(exact > 1e-4),
        "PyCIL's entries at its clamp": share(results["PyCIL"] == 1e-4),
        "mammoth / exact, in evaluation mode": short(Comparison.of(evaluated, exact).factor),
        "van de Ven, sample: trace over 100 seeds": mean_and_range(
            traces_of_sampled_labels(model, x)
        ),
        "the same, seeds that draw only the likeliest labels": share(likely_only),
        "our `MonteCarlo(1)`: trace over 100 seeds": mean_and_range(
            traces_of_monte_carlo(model, x, y)
        ),
        "LLM_EWC's entries rounded to 0": share(results["LLM_EWC"] == 0),
        "LLM_EWC, 3511 equal terms: those that are summed": share(
            equal_terms_summed(LLM_EWC_BATCHES)
        ),
        "inputs times 1024: first layer's entries set to 100": share(halved[first] == 100),
        "the exact values of this layer, median": short(float(values[first].median())),
        "theirs / exact in this layer, median": short(float(ratio[first].nanmedian())),
        "theirs / exact in the other layers, median": short(float(ratio[others].nanmedian())),
        "FusionBench with batches of 1, theirs / exact": short(single.factor),
        "the same, rank correlation": f"{single.rank:.2f}",
        **few,
    }


def mean_and_range(values: Tensor) -> str:
    """Mean and range."""
    low, high = values.aminmax()
    return f"{short(float(values.mean()))} ({short(float(low))} to {short(float(high))})"


def share(entries: Tensor) -> str:
    """The share of entries that are true."""
    return f"{float(entries.double().mean()):.1%}".replace("%", " %")


def code_tables() -> list[str]:
    """The tables of the eight codes, in Markdown."""
    x, y = digits()
    lines, columns = [*sources(), "", *formulas()], []
    for state, model in (("Untrained", untrained(x)), ("Trained", trained(x, y))):
        likely = model(x).softmax(1)[torch.arange(N), y].mean()
        results = diagonals(model, x, y)
        lines += ["", f"{state}: mean probability of the label {likely:.3f}", ""]
        lines += numbers(results)
        columns.append(faults(results, model, x, y))
    first, second = columns
    lines += ["", "| | untrained | trained |", "|---|---|---|"]
    return lines + [f"| {name} | {first[name]} | {second[name]} |" for name in first]


# --- BackPACK, nngeometry, laplace-torch --------------------------------------------------

EXAMPLES = 64


def network() -> nn.Sequential:
    """A small MLP with three outputs, in double precision."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    """Its examples in batches of a size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (EXAMPLES,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def our_product() -> Tensor:
    """Our Kronecker matrix of the first layer's weight, without its bias, as a matrix."""
    data = batches(EXAMPLES)
    fisher = fisher_information(network(), data, structure=Kronecker(), parameters=["0.weight"])
    block = fisher.blocks[0]
    assert isinstance(block, KroneckerProduct)
    return block.to_dense().flatten()


def backpack(extension: str, reduction: str) -> Tensor:
    """One backward pass over all examples with an extension."""
    import backpack as library
    from backpack import extensions

    model = library.extend(network())
    loss = library.extend(nn.CrossEntropyLoss(reduction=reduction))
    ((x, y),) = batches(EXAMPLES)
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

    ((x, y),) = batches(EXAMPLES)
    model = network().float()
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=16)
    matrix = FIM(model=model, loader=loader, representation=PMatDiag)
    return matrix.get_diag().double()


def laplace(kind: str) -> Tensor:
    """A backend's ``diag`` summed over batches, as its ``fit`` does."""
    from laplace import curvature

    model = network().float()
    backend = getattr(curvature, kind)(model, "classification")
    total = torch.zeros(())
    for x, y in batches(16):
        model.zero_grad()
        total = total + backend.diag(x.float(), y)[1]
    return total.double()


def library_table() -> list[str]:
    """The table of the libraries, in Markdown."""
    data = batches(EXAMPLES)
    exact = flat(fisher_information(network(), data).diagonal())
    empirical = flat(fisher_information(network(), data, estimator=Empirical()).diagonal())
    rows = [
        ("BackPACK `DiagGGNExact`, mean", "`Exact`", exact, backpack("DiagGGNExact", "mean")),
        ("the same, reduction sum", "`Exact`", exact, backpack("DiagGGNExact", "sum")),
        (
            "BackPACK `SumGradSquared`, mean",
            "`Empirical`",
            empirical,
            backpack("SumGradSquared", "mean"),
        ),
        ("the same, reduction sum", "`Empirical`", empirical, backpack("SumGradSquared", "sum")),
        (
            "BackPACK `KFLR`, mean",
            "`Exact`, `Kronecker`, weights only",
            our_product(),
            backpack("KFLR", "mean"),
        ),
        ("nngeometry `FIM`, `PMatDiag`", "`Exact`", exact, nngeometry()),
        ("laplace-torch `CurvlinopsGGN.diag`", "`Exact`", exact, laplace("CurvlinopsGGN")),
        (
            "laplace-torch `CurvlinopsEF.diag`",
            "`Empirical`",
            empirical,
            laplace("CurvlinopsEF"),
        ),
    ]
    head = ["| theirs | ours | theirs / ours | spread |", "|---|---|---|---|"]
    return head + [
        f"| {name} | {quantity} | {factor:.4g} | {spread:.0%} |".replace("%", " %")
        for name, quantity, expected, theirs in rows
        for factor, spread in [factor_and_spread(theirs, expected)]
    ]


def factor_and_spread(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    """The median of theirs / ours, and how far 90 % of the entries are from it at most."""
    ratio = theirs / ours
    factor = float(ratio.median())
    return factor, float((ratio / factor - 1).abs().quantile(0.9))


def main() -> None:
    """Print the tables."""
    print("\n".join(code_tables()))
    missing = [name for name in ("backpack", "nngeometry", "laplace") if find_spec(name) is None]
    if missing:
        print(
            f"\nThe table of other libraries needs {', '.join(missing)}: install the extra bench."
        )
    else:
        print(f"\nN = {EXAMPLES} examples\n")
        print("\n".join(library_table()))


if __name__ == "__main__":
    main()
