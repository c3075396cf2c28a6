"""EWC in Avalanche: the plugin goes into any supervised strategy.

    python examples/avalanche_plugin.py

The tasks are those of ``ewc_from_scratch.py``: scikit-learn's handwritten digits, with their
pixels in another order for every task.
"""

import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ewc.plugin import EWCPlugin

NUM_TASKS, NUM_TRAIN = 3, 1200


def permuted_digits() -> CLScenario:
    """Streams of training and of test tasks: an order of the pixels for every task."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    train, test = [], []
    for _ in range(NUM_TASKS):
        x = x[:, torch.randperm(64)]
        train.append(_dataset(x[:NUM_TRAIN], y[:NUM_TRAIN]))
        test.append(_dataset(x[NUM_TRAIN:], y[NUM_TRAIN:]))
    return benchmark_from_datasets(train=train, test=test)


def _dataset(x: Tensor, y: Tensor) -> AvalancheDataset:
    targets = DataAttribute(y.tolist(), "targets")
    return AvalancheDataset([TensorDataset(x, y)], data_attributes=[targets])


def accuracies(strength: float) -> list[float]:
    """Train all tasks in turn; the test accuracy on each after the last, in percent."""
    torch.manual_seed(0)
    benchmark = permuted_digits()
    model = SimpleMLP(input_size=64, hidden_size=100, drop_rate=0)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=64,
        train_epochs=16,
        eval_mb_size=512,
        plugins=[EWCPlugin(strength=strength)] if strength else [],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    metrics = strategy.eval(benchmark.test_stream)
    return [100 * accuracy for _, accuracy in sorted(metrics.items())]


if __name__ == "__main__":
    print("test accuracy after the last task, %:    task 1  task 2  task 3")
    for name, strength in [("without EWC", 0.0), ("with EWC", 30.0)]:
        print(f"{name:40}", *(f"{percent:7.1f}" for percent in accuracies(strength)))
