"""How long things take beside what others do, measured in one run.

    pip install -e ".[bench]"
    python scripts/bench_speed.py --data-root DIR [--threads N] [fisher] [epoch] [step] [import]

Every ratio comes from runs that take turns, so that a machine that slows down slows both;
printed are medians. Nothing here is a test.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ewc import Categorical, DiagonalFisher, EWCPenalty, Exact, fisher_information  # noqa: E402
from ewc.plugin import EWCPlugin  # noqa: E402
from experiments.tasks.benchmarks import Permuted  # noqa: E402
from experiments.tasks.images import MNIST, Images  # noqa: E402
from experiments.training.loaders import InMemoryNaive  # noqa: E402
from experiments.training.models import MLP  # noqa: E402


def mlp() -> nn.Sequential:
    """The network of all measurements: 784-400-400-10."""
    torch.manual_seed(0)
    model = MLP([400, 400]).build(784, 10, None)
    assert isinstance(model, nn.Sequential)
    return model


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def verdict(what: str, ratio: float, bar: float, *, at_least: bool = False) -> None:
    """Print a ratio beside its bar."""
    held = ratio >= bar if at_least else ratio <= bar
    sign = ">=" if at_least else "<="
    print(f"  {what}: {ratio:.3g} (bar {sign} {bar:g}: {'held' if held else 'MISSED'})")


def trained(model: nn.Sequential, images: Images) -> nn.Sequential:
    """The network after 300 steps: a Fisher matrix is taken of trained networks."""
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(300):
        rows = torch.arange(step * 128, (step + 1) * 128) % len(images)
        loss = functional.cross_entropy(model(images.pixels[rows]), images.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def bench_fisher(images: Images) -> None:
    """The exact diagonal of 10,000 images beside BackPACK, Avalanche and the plain loop."""
    import avalanche.training.plugins.ewc as avalanche_ewc
    import backpack
    from backpack.extensions import DiagGGNExact

    x, y = images.pixels[:10_000], images.labels[:10_000]
    model = trained(mlp(), images)
    extended = backpack.extend(trained(mlp(), images))
    criterion = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    batches = list(zip(x.split(1000), y.split(1000), strict=True))
    small = {
        size: [
            (a, b, torch.zeros_like(b)) for a, b in zip(x.split(size), y.split(size), strict=True)
        ]
        for size in (32, 128)
    }
    traces: dict[str, float] = {}

    def ours() -> None:
        traces["ours"] = float(fisher_information(model, batches).trace())

    def by_backpack() -> None:
        total = 0.0
        for a, b in batches:
            extended.zero_grad()
            with backpack.backpack(DiagGGNExact()):
                criterion(extended(a), b).backward()
            total += sum(float(p.diag_ggn_exact.sum()) for p in extended.parameters())
        traces["BackPACK DiagGGNExact"] = total / len(x)

    def by_avalanche(size: int) -> None:
        plugin = avalanche_ewc.EWCPlugin(1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # Its own code, over batches that are already tensors.
        loader = avalanche_ewc.DataLoader
        avalanche_ewc.DataLoader = lambda *_, **__: small[size]
        try:
            importances = plugin.compute_importances(
                model, nn.CrossEntropyLoss(), optimizer, [], torch.device("cpu"), size
            )
        finally:
            avalanche_ewc.DataLoader = loader
        traces[f"Avalanche's pass, batch {size}"] = float(
            sum(value.data.sum() for value in importances.values())
        )

    def one_by_one(count: int) -> None:
        # As the reference code of van de Ven does it: every label of every example.
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(count):
            outputs = model(x[i : i + 1])
            weights = outputs.detach().softmax(1)[0]
            for k in range(10):
                model.zero_grad()
                loss = functional.cross_entropy(outputs, torch.tensor([k]))
                loss.backward(retain_graph=k < 9)
                for name, p in model.named_parameters():
                    total[name] += weights[k] * p.grad.detach() ** 2
        traces["one example, one class"] = sum(float(sums.sum()) for sums in total.values()) / count

    def product() -> None:
        left @ right

    left, right = torch.randn(2000, 2000), torch.randn(2000, 2000)
    times = medians(
        {
            "ours": ours,
            "BackPACK DiagGGNExact": by_backpack,
            "Avalanche's pass, batch 32": lambda: by_avalanche(32),
            "Avalanche's pass, batch 128": lambda: by_avalanche(128),
            "one product of 2000 x 2000": product,
        },
        9,
    )
    loop = 50
    times["one example, one class"] = medians({"": lambda: one_by_one(loop)}, 3)[""] * 10_000 / loop
    print("exact diagonal Fisher, 784-400-400-10 trained for 300 steps, 10,000 MNIST images")
    for name, seconds in times.items():
        trace = f"   trace {traces[name]:.6g}" if name in traces else ""
        print(f"  {name:30s} {seconds:9.4f} s{trace}")
    print(f"  (one example, one class: {loop} images measured, times {10_000 // loop})")
    # Forward, 9 backward vectors to the outputs of the first layer, the final products.
    sizes = [(784, 400), (400, 400), (400, 10)]
    forward = sum(2 * i * o for i, o in sizes)
    operations = 10_000 * (2 * forward + 9 * sum(2 * i * o for i, o in sizes[1:]))
    rate = 2 * 2000**3 / times["one product of 2000 x 2000"]
    share = operations / rate / times["ours"]
    print(f"  {operations / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s: {100 * share:.0f} % of it")
    verdict("ours / BackPACK", times["ours"] / times["BackPACK DiagGGNExact"], 0.75)
    for size in small:
        ratio = times["ours"] / times[f"Avalanche's pass, batch {size}"]
        verdict(f"ours / Avalanche at batch {size}", ratio, 1.0)
    speedup = times["one example, one class"] / times["ours"]
    verdict("one by one / ours", speedup, 200, at_least=True)


def strategy_of(model: nn.Module, plugins: list[object], iterations: int) -> InMemoryNaive:
    """Our Avalanche path, as the experiments build it."""
    from avalanche.training.plugins import EvaluationPlugin

    return InMemoryNaive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=128,
        eval_mb_size=1000,
        iterations=iterations,
        epochs=1,
        seed=0,
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[]),
    )


def bench_epoch(data_root: Path) -> None:
    """One epoch of permuted MNIST: our path, a plain loop, Avalanche's classic benchmark."""
    from avalanche.benchmarks.classic import PermutedMNIST
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin

    tasks = Permuted(MNIST(), 2).build(data_root, 0, torch.device("cpu"))
    experience = tasks.scenario.streams["train"][1]
    data = experience.data
    pixels, labels = data.batch(torch.arange(len(data)))

    def ours() -> None:
        strategy_of(mlp(), [], 469).train(experience)

    def plain() -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for rows in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            optimizer.step()

    times = medians({"ours": ours, "plain tensor loop": plain}, 5)

    # Avalanche's loader makes one example at a time in Python; the dataset's own code.
    benchmark = PermutedMNIST(2, seed=0, dataset_root=data_root)
    model = nn.Sequential(nn.Flatten(), *mlp())
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=128,
        evaluator=EvaluationPlugin(loggers=[]),
    )
    start = time.perf_counter()
    strategy.train(benchmark.train_stream[1])
    times["Avalanche's classic benchmark"] = time.perf_counter() - start
    print("one epoch of permuted MNIST, 469 steps of 128 (the classic benchmark once)")
    for name, seconds in times.items():
        print(f"  {name:30s} {seconds:9.3f} s")
    verdict("ours / plain", times["ours"] / times["plain tensor loop"], 1.5)
    speedup = times["Avalanche's classic benchmark"] / times["ours"]
    verdict("classic / ours", speedup, 8, at_least=True)


def bench_step(data_root: Path) -> None:
    """A training step with the penalty of 50 tasks, in our Avalanche path and alone."""
    # As the experiments do: gradients of dead pixels are denormal numbers in Adam's state.
    torch.set_flush_denormal(True)
    tasks = Permuted(MNIST(), 2).build(data_root, 0, torch.device("cpu"))
    experience = tasks.scenario.streams["train"][1]
    first = tasks.scenario.streams["train"][0].data
    model = trained(mlp(), Images(*first.batch(torch.arange(60_000))))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fisher = fisher_information(
        model, [first.batch(torch.arange(10_000))], Categorical(), estimator=Exact()
    )
    plugin = EWCPlugin(100.0)
    for _ in range(50):
        plugin.penalty.consolidate(DiagonalFisher(fisher.diagonal(), 60_000), model)
    plugin.after_training_exp = lambda *_, **__: None  # only the steps are timed here
    steps = 100

    def through(plugins: list[object]) -> Callable[[], None]:
        def train() -> None:
            model.load_state_dict(start)
            strategy_of(model, plugins, steps).train(experience)

        return train

    pixels, labels = experience.data.batch(torch.arange(60_000))

    def alone(penalty: EWCPenalty | None) -> Callable[[], None]:
        def train() -> None:
            model.load_state_dict(start)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            for rows in torch.arange(128 * steps).split(128):
                loss = functional.cross_entropy(model(pixels[rows]), labels[rows])
                if penalty is not None:
                    loss = loss + penalty(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return train

    times = medians(
        {
            "naive, Avalanche path": through([]),
            "EWC, Avalanche path": through([plugin]),
            "naive, plain loop": alone(None),
            "EWC, plain loop": alone(plugin.penalty),
        },
        15,
    )
    print("a training step of batch 128, Adam, after 50 tasks (terms kept: "
          f"{len(plugin.penalty.terms)})")  # fmt: skip
    for name, seconds in times.items():
        print(f"  {name:30s} {1000 * seconds / steps:9.3f} ms")
    for path in ("Avalanche path", "plain loop"):
        verdict(f"EWC / naive, {path}", times[f"EWC, {path}"] / times[f"naive, {path}"], 1.15)


def bench_import() -> None:
    """``import ewc`` beside ``import torch``, in fresh interpreters."""

    def importing(modules: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)

    times = medians({"torch": importing("torch"), "torch, ewc": importing("torch, ewc")}, 9)
    print("import, whole process")
    for name, seconds in times.items():
        print(f"  {name:30s} {seconds:9.3f} s")
    verdict("seconds over import torch", times["torch, ewc"] - times["torch"], 0.15)


def main() -> None:
    """Run the chosen measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["fisher", "epoch", "step", "import"])
    parser.add_argument("--data-root", type=Path, required=True, help="the folder of MNIST/raw")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    for what in arguments.what:
        if what == "fisher":
            bench_fisher(MNIST().load(arguments.data_root)[0])
        elif what == "epoch":
            bench_epoch(arguments.data_root)
        elif what == "step":
            bench_step(arguments.data_root)
        elif what == "import":
            bench_import()
        else:
            parser.error(f"{what!r} is not one of fisher, epoch, step, import")


if __name__ == "__main__":
    main()
