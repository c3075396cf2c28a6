"""Elastic Weight Consolidation by hand, in plain PyTorch: a script to be read.

    python examples/ewc_from_scratch.py

A network learns three tasks one after the other: scikit-learn's handwritten digits, with
their pixels in another order for every task.  Without EWC it forgets the first tasks.
Kirkpatrick et al. 2017 (arXiv:1612.00796) add a penalty for every old task: it holds each
weight near its old value, as firmly as the Fisher information says.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NUM_TASKS, NUM_TRAIN, NUM_FISHER = 3, 1200, 200

Data = tuple[Tensor, Tensor]
Weights = list[Tensor]


def permuted_digits() -> list[tuple[Data, Data]]:
    """For every task the training and the test examples."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    tasks = []
    for _ in range(NUM_TASKS):
        x = x[:, torch.randperm(64)]
        tasks.append(((x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])))
    return tasks


def fisher_diagonal(model: nn.Module, x: Tensor) -> Weights:
    """The mean over examples of E_y[(d log p(y | x) / d theta)^2], y drawn from the model."""
    parameters = list(model.parameters())
    fisher = [torch.zeros_like(p) for p in parameters]
    for x_n in x:
        log_p = model(x_n).log_softmax(0)
        for log_p_y in log_p:
            gradients = torch.autograd.grad(log_p_y, parameters, retain_graph=True)
            for f, g in zip(fisher, gradients, strict=True):
                f.add_(log_p_y.exp().detach() * g**2 / len(x))
    return fisher


def penalty(model: nn.Module, old_tasks: list[tuple[Weights, Weights]]) -> Tensor:
    """1/2 * sum over the old tasks and the weights of F * (theta - old theta)^2."""
    value = torch.zeros(())
    for old, fisher in old_tasks:
        for theta, theta_old, f in zip(model.parameters(), old, fisher, strict=True):
            value = value + 0.5 * (f * (theta - theta_old) ** 2).sum()
    return value


def accuracies(strength: float) -> list[float]:
    """Train all tasks in turn; the test accuracy on each after the last, in percent."""
    torch.manual_seed(0)
    tasks = permuted_digits()
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    old_tasks: list[tuple[Weights, Weights]] = []
    for (x, y), _ in tasks:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(300):
            batch = torch.randint(len(x), (64,))
            loss = cross_entropy(model(x[batch]), y[batch]) + strength * penalty(model, old_tasks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if strength:
            old_weights = [p.detach().clone() for p in model.parameters()]
            old_tasks.append((old_weights, fisher_diagonal(model, x[:NUM_FISHER])))
    return [float((model(x).argmax(1) == y).float().mean()) * 100 for _, (x, y) in tasks]


if __name__ == "__main__":
    print("test accuracy after the last task, %:    task 1  task 2  task 3")
    for name, strength in [("without EWC", 0.0), ("with EWC", 30.0)]:
        print(f"{name:40}", *(f"{accuracy:7.1f}" for accuracy in accuracies(strength)))
