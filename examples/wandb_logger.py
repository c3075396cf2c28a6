"""Avalanche's metrics in Weights & Biases, without an account: the run is kept on disk.

    python examples/wandb_logger.py

``wandb sync wandb/offline-run-...`` uploads it later.
"""

import torch
import wandb
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from avalanche_plugin import permuted_digits
from torch import nn

from ewc.plugin import EWCPlugin
from experiments.recording.avalanche_logger import WandBLogger

with wandb.init(mode="offline", project="digits", name="EWC strength=30") as run:
    model = SimpleMLP(input_size=64, hidden_size=50, drop_rate=0)
    evaluator = EvaluationPlugin(
        accuracy_metrics(epoch=True, experience=True, stream=True),
        loss_metrics(minibatch=True),
        forgetting_metrics(experience=True, stream=True),
        loggers=[WandBLogger(run)],
    )
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=64,
        plugins=[EWCPlugin(strength=30.0)],
        evaluator=evaluator,
    )
    benchmark = permuted_digits()
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
