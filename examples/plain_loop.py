"""EWC in a plain PyTorch loop: the penalty is a module that is added to any loss.

    python examples/plain_loop.py

The tasks and the network are those of ``ewc_from_scratch.py``.  The Fisher information is
now of all training examples, and takes milliseconds.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ewc import EWCPenalty, fisher_information

NUM_TASKS, NUM_TRAIN, EPOCHS = 3, 1200, 16


def permuted_digits() -> list[tuple[TensorDataset, TensorDataset]]:
    """For every task, an order of the pixels, the training and the test examples."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    tasks = []
    for _ in range(NUM_TASKS):
        x = x[:, torch.randperm(64)]
        train = TensorDataset(x[:NUM_TRAIN], y[:NUM_TRAIN])
        tasks.append((train, TensorDataset(x[NUM_TRAIN:], y[NUM_TRAIN:])))
    return tasks


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The share of right answers, in percent."""
    x, y = test.tensors
    right: Tensor = model(x).argmax(1) == y
    return 100 * float(right.float().mean())


def accuracies(strength: float) -> list[float]:
    """Train all tasks in turn; the test accuracy on each after the last, in percent."""
    torch.manual_seed(0)
    tasks = permuted_digits()
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    penalty = EWCPenalty(strength=strength)
    for train, _ in tasks:
        batches = DataLoader(train, batch_size=64, shuffle=True)
        penalty.num_examples = len(train)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            for x, y in batches:
                loss = cross_entropy(model(x), y) + penalty(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        penalty.consolidate(fisher_information(model, batches), model)
    return [accuracy(model, test) for _, test in tasks]


if __name__ == "__main__":
    print("test accuracy after the last task, %:    task 1  task 2  task 3")
    for name, strength in [("without EWC", 0.0), ("with EWC", 30.0)]:
        print(f"{name:40}", *(f"{percent:7.1f}" for percent in accuracies(strength)))
