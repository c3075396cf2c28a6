"""Avalanche's metrics in a run of W&B, read back from disk."""

import io
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
import wandb
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue, TensorImage
from PIL.Image import new

from experiments.recording.avalanche_logger import WandBLogger, readable


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp001", "eval/accuracy/task01"),
        ("Top1_Acc_Stream/eval_phase/test_stream/Task004", "eval/accuracy/stream"),
        ("Top1_Acc_Epoch/train_phase/train_stream/Task000", "train/accuracy/epoch"),
        ("Top1_RunningAcc_Epoch/train_phase/train_stream", "train/running_accuracy/epoch"),
        ("Loss_MB/train_phase/train_stream/Task003", "train/loss/batch"),
        ("ExperienceForgetting/eval_phase/test_stream/Exp000", "eval/experience_forgetting/task00"),
        ("StreamForgetting/eval_phase/test_stream", "eval/stream_forgetting"),
        ("ConfusionMatrix_Stream/eval_phase/test_stream", "eval/confusion_matrix/stream"),
        ("Loss_Exp/eval_phase/train_stream/Task0/Exp2", "eval/loss/train_stream/task02"),
        ("Loss_Exp/eval_phase/valid_stream/Task0/Exp2", "eval/loss/valid_stream/task02"),
        ("Time_Epoch/train_phase", "train/time/epoch"),
    ],
)
def test_names_are_readable(name, here):
    assert readable(name) == here


TRAINED = SimpleNamespace(clock=SimpleNamespace(train_exp_counter=2))
"""What a logger asks of a strategy: the experiences so far."""


def records(folder):
    """All records of the runs below a folder, by W&B's own reader."""
    lines = []
    for path in sorted(folder.rglob("run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
        lines += [json.loads(line) for line in done.stdout.splitlines()]
    return lines


def of_type(lines, kind):
    return [line[kind] for line in lines if line["type"] == kind]


def metric(name, value, x=7):
    return MetricValue(None, f"{name}/eval_phase/test_stream", value, x)


def test_every_kind_of_value_is_shown_in_one_row(tmp_path):
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    weights = io.BytesIO()
    torch.save({"a": torch.ones(2)}, weights)
    values = {
        "Loss_Stream": 0.5,
        "Number": torch.tensor(3),
        "Weights": torch.randn(5),
        "Matrix": torch.tensor([[1, 0], [2, 3]]),
        "ConfusionMatrix_Stream": AlternativeValues(new("RGB", (4, 4)), torch.eye(2)),
        "Figure": figure,
        "Image": TensorImage(torch.zeros(4, 4, 3)),
        "WeightCheckpoint/Exp001": weights.getvalue(),
        "Words": "not shown",
    }
    with wandb.init(mode="offline", dir=tmp_path) as run:
        logger = WandBLogger(run)
        logger.log_metrics([MetricValue(None, "Loss_MB/train_phase/train_stream", 1.5, 7)])
        logger.after_training_iteration(TRAINED, [])
        logger.log_metrics([metric(name, value) for name, value in values.items()])
        logger.after_eval(TRAINED, [])
    plt.close(figure)
    lines = records(tmp_path)
    training, evaluation = (record["item"] for record in of_type(lines, "history"))
    assert (training["step"], training["train/loss/batch"]) == (7, 1.5)
    assert "tasks_learnt" not in training
    assert (evaluation["step"], evaluation["tasks_learnt"]) == (7, 2)
    assert (evaluation["eval/loss/stream"], evaluation["eval/number"]) == (0.5, 3)
    kinds = {
        "eval/weights": "histogram",
        "eval/matrix": "table-file",
        "eval/confusion_matrix/stream": "image-file",
        "eval/confusion_matrix/stream/table": "table-file",
        "eval/figure": "image-file",
        "eval/image": "image-file",
    }
    assert {name: evaluation[f"{name}._type"] for name in kinds} == kinds
    assert not any("words" in key for key in evaluation)
    axes = {m.get("glob_name"): m.get("step_metric") for m in of_type(lines, "metric")}
    assert (axes["train/*"], axes["eval/*"]) == ("step", "tasks_learnt")
    artifacts = {a["name"]: a for a in of_type(lines, "artifact") if a["type"] == "model"}
    assert set(artifacts[f"model-{run.id}"]["aliases"]) == {"latest", "task01"}


def test_a_logger_begins_its_run_and_goes_on_after_a_checkpoint(tmp_path):
    logger = WandBLogger(mode="offline", dir=tmp_path, project="digits")
    assert not list(tmp_path.rglob("*.wandb"))
    for _ in range(2):
        logger.log_metrics([metric("Loss_Stream", 0.5)])
        logger.after_eval(TRAINED, [])
        first = logger.run.id
        logger.run.finish()
        logger = pickle.loads(pickle.dumps(logger))
        assert logger.options["id"] == first
    runs = {run["run_id"] for run in of_type(records(tmp_path), "run")}
    assert runs == {first}
