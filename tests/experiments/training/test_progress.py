"""The bar of a run: what it shows, and the time it expects."""

import io
import logging
import re
import sys
import time
from types import SimpleNamespace

import hydra
import pytest
from rich.console import Console

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.experiment import Experiment
from experiments.recording.label import Label
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB
from experiments.training import progress as module
from experiments.training.progress import RunProgress

SMALL = ["model.hidden=[16]", "training.iterations=6", "benchmark.num_tasks=2"]
SMALL += ["benchmark=permuted_digits", "wandb.mode=disabled", "fisher.batch_size=300"]


def shown(tmp_path, *, terminal):
    """What a run writes to its console."""
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        config = plain(hydra.compose("config", overrides=SMALL))
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    prepared = build(config, Experiment).prepare()
    with Recorder(tmp_path, WandB(mode="disabled"), {}, Label("test")) as recorder:
        prepared.run(recorder, console, logging.getLogger("test"))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())


def test_bar_shows_training_fisher_pass_and_evaluation_of_each_task(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REFRESH", 0.0)
    monkeypatch.setattr(module, "BarColumn", lambda **_: module.TextColumn("|"))
    updates = []
    show = RunProgress._show

    def noted(self, *arguments):
        show(self, *arguments)
        task = self._bar.tasks[0]
        updates.append((task.description, task.completed, task.total, task.fields["note"]))

    monkeypatch.setattr(RunProgress, "_show", noted)
    text = shown(tmp_path, terminal=True)
    assert "task 1/2" in text
    descriptions = list(dict.fromkeys(update[0] for update in updates))
    passes = ("training", "Fisher pass", "evaluation")
    assert descriptions == [f"task {task}/2 {kind}" for task in (1, 2) for kind in passes]
    steps = [done for name, done, total, _ in updates if name == "task 2/2 training" and total == 6]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    # 1,437 images in batches of 300; the pass begins with a look at one batch.
    fisher = [done for name, done, total, _ in updates if "Fisher" in name and total == 5]
    assert fisher[-5:] == [0, 1, 2, 3, 4]
    last_step = next(u for u in reversed(updates) if u[0] == "task 2/2 training")
    assert re.fullmatch(r"[\d.]+/s  loss \d+\.\d{4}  \d+:\d\d left", last_step[3])


def test_nothing_is_shown_without_a_terminal(tmp_path):
    assert shown(tmp_path, terminal=False) == ""


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_time_left_is_that_of_the_steps_and_passes_to_come(monkeypatch):
    clock = Clock(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True)
    bar = RunProgress(console, ["a", "b", "c"])
    strategy = SimpleNamespace(
        num_steps={"a": 10, "b": 20, "c": 30}.get,
        experience=SimpleNamespace(current_experience=0),
        clock=SimpleNamespace(train_exp_iterations=0),
    )
    bar.before_training_exp(strategy)
    assert bar._left(10) is None  # nothing to go by
    for step in range(10):
        clock.now += 2.0
        strategy.clock.train_exp_iterations = step
        bar.after_training_iteration(strategy)
    assert bar._left(0) == pytest.approx(2.0 * 50)  # what follows a task is not known yet
    bar.after_training_exp(strategy)
    clock.now += 7.0
    bar.after_eval(strategy)
    strategy.experience.current_experience = 1
    bar.before_training_exp(strategy)
    assert bar._left(20) == pytest.approx(2.0 * 50 + 2 * 7)
    for step in range(20):
        clock.now += 5.0
        strategy.clock.train_exp_iterations = step
        bar.after_training_iteration(strategy)
    mean = (10 * 2.0 + 20 * 5.0) / 30
    assert bar._left(0) == pytest.approx(30 * mean + 2 * 7)
    bar.after_training_exp(strategy)
    clock.now += 3.0
    assert bar._left(0) == pytest.approx(30 * mean + 7 + (7 - 3))
    clock.now += 30.0  # longer than after the first task
    assert bar._left(0) == pytest.approx(30 * mean + 7)
    bar.close()


def test_lines_of_the_log_are_printed_above_the_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    handler = logging.StreamHandler(stream)
    elsewhere = logging.StreamHandler(io.StringIO())
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler, elsewhere])
    text = io.StringIO()
    bar = RunProgress(Console(file=text, force_terminal=True), ["a"])
    bar.before_training_exp(
        SimpleNamespace(num_steps=lambda _: 3, experience=SimpleNamespace(current_experience=0))
    )
    untouched = elsewhere.stream
    root.warning("a line")
    assert "a line" in text.getvalue()
    assert stream.getvalue() == ""
    bar.close()
    root.warning("another")
    assert stream.getvalue() == "another\n"
    assert elsewhere.stream is untouched
