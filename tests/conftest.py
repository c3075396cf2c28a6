"""What every test shares: real data, models of all kinds, and a machine left as it was."""

import logging
import os
import struct
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import reference
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from ewc import Categorical, Empirical, Gaussian

torch.set_num_threads(1)

# The same cases every time: a failure is one of the change that is tested.
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("same")

MNIST_ROOT = Path(os.environ.get("EWC_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def _hermetic(tmp_path, monkeypatch):
    """W&B writes into the test's own folder and never talks to anyone."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mnist_root():
    """The folder that holds MNIST/raw, or a skip."""
    if not (MNIST_ROOT / "MNIST" / "raw").is_dir():
        pytest.skip(f"MNIST is not at {MNIST_ROOT}")
    return MNIST_ROOT


@pytest.fixture(scope="session")
def mnist(mnist_root):
    """The first 2,000 training images ([n, 784], 0..1) and labels of real MNIST."""
    raw = mnist_root / "MNIST" / "raw"
    n = 2000
    with (raw / "train-images-idx3-ubyte").open("rb") as file:
        _, _, rows, columns = struct.unpack(">4i", file.read(16))
        pixels = np.frombuffer(file.read(n * rows * columns), np.uint8).copy()
    with (raw / "train-labels-idx1-ubyte").open("rb") as file:
        file.read(8)
        labels = np.frombuffer(file.read(n), np.uint8).copy()
    images = torch.from_numpy(pixels).reshape(n, rows * columns).float() / 255
    return images, torch.from_numpy(labels).long()


@pytest.fixture
def command_line(monkeypatch, capsys):
    """``python -m experiments.run`` in this process: the exit code, what was printed, and errors.

    Starting a process takes longer than most of what the command line is tested for.
    """
    from experiments import run

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments):
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        code = 0
        try:
            run.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what Python prints, with status 1
            code, err = 1, f"{err}{code}\n"
        return code or 0, out, err

    yield call
    root.handlers[:], root.level = handlers, level


class Scale(nn.Module):
    """A layer no rule covers: a learned scale and shift."""

    def __init__(self, features):
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(features))
        self.shift = nn.Parameter(0.1 * torch.randn(features))

    def forward(self, x):
        return x * self.scale + self.shift


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))


def cnn_with_batchnorm():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, groups=2, padding="same", padding_mode="circular", bias=False),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(54, 3),
    )
    model[2].running_mean.normal_()
    model[2].running_var.uniform_(0.5, 2.0)
    return model


def without_rule():
    return nn.Sequential(nn.Linear(6, 5), Scale(5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


MODELS = {"mlp": (mlp, 6), "cnn_batchnorm": (cnn_with_batchnorm, 36), "no_rule": (without_rule, 6)}


@pytest.fixture(params=MODELS)
def network(request):
    """A small network in double precision, in training mode, and 7 inputs and labels."""
    build, features = MODELS[request.param]
    model = build().double()
    x = torch.randn(7, features, dtype=torch.float64)
    classes = model(x).shape[1]
    y = torch.randint(classes, (7,))
    return model.train(), x, y


EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""What double precision must reach."""


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def oracle(model, x, y, likelihood, estimator):
    """The dense matrix from the definition, the model in evaluation mode."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    examples = [(x_n,) for x_n in x]
    if isinstance(estimator, Empirical):
        variance = likelihood.variance if isinstance(likelihood, Gaussian) else None
        matrix = reference.empirical_fisher(model, examples, y, variance)
    elif isinstance(likelihood, Gaussian):
        matrix = reference.gaussian_fisher(model, examples, likelihood.variance)
    else:
        matrix = reference.categorical_fisher(model, examples)
    for module, mode in modes:
        module.training = mode
    return matrix


def targets_for(model, x, y, likelihood):
    return y if isinstance(likelihood, Categorical) else torch.randn_like(model(x).detach())
