"""What W&B has of a run, read back from disk; and W&B out of reach, slow, failing or killed."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hydra
import pytest
import torch
import wandb
from rich.console import Console
from safetensors.torch import load_file

from ewc import EWCPenalty, FisherMatrix
from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.experiment import Experiment
from experiments.recording import wandb_run
from experiments.recording.label import Label, label_of
from experiments.recording.tracking import Recorder
from experiments.recording.wandb_run import WandB

ROOT = Path(__file__).parents[3]

RECORDING = """
import os, signal, sys, time
from pathlib import Path
from experiments.recording import wandb_run
from experiments.recording.label import Label
from experiments.recording.tracking import Recorder

def cores():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode()
        except OSError:
            continue
        if "wandb-core" in command and f"--pid\\0{os.getpid()}\\0" in command + "\\0":
            yield int(path.parent.name)

wandb_run.PATIENCE = 3.0
folder, mode, fault = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
recorder = Recorder(folder, wandb_run.WandB(mode=mode), {"seed": 0}, Label("test"))
with recorder:
    for step in range(10):
        recorder.log({"step": step, "train/loss": 1.0, "train/penalty": 0.0})
    if fault == "killed":
        (core,) = cores()
        os.kill(core, signal.SIGKILL)
        time.sleep(0.5)
    for step in range(10, 20):
        recorder.log({"step": step, "train/loss": 1.0, "train/penalty": 0.0})
    recorder.table("accuracy", ["task"], [[1]])
    recorder.summary({"average_accuracy": 1.0})
print(recorder.sync_command)
"""


class Failing(BaseHTTPRequestHandler):
    """A server that answers every request with an internal error."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def records(folder):
    """All records of the runs in a folder by their types, by W&B's own reader."""
    lines = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
        lines += [json.loads(line) for line in done.stdout.splitlines()]
    return {
        line["type"]: [o[line["type"]] for o in lines if o["type"] == line["type"]]
        for line in lines
    }


OVERRIDES = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[20]"]
OVERRIDES += ["training.iterations=25", "strategy.strength=10"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, what W&B has of it, files elsewhere, and the network and its results."""
    folder, home = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR"):
            patch.setenv(name, str(home))
        for name in [name for name in os.environ if name.startswith(("WANDB_", "XDG_"))]:
            patch.delenv(name)
        with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
            whole = hydra.compose("config", overrides=OVERRIDES, return_hydra_config=True)
            config = plain(hydra.compose("config", overrides=OVERRIDES))
        prepared = build(config, Experiment).prepare()
        label = label_of(whole.hydra.runtime.choices, OVERRIDES, 0)
        with Recorder(folder, WandB(), config, label) as recorder:
            print("a line of the run")
            results = prepared.run(recorder, Console(quiet=True), logging.getLogger("test"))
            recorder.page("page", "<p>shown</p>")
        wandb.teardown()  # the next test has a service with its own folders
    elsewhere = [path for path in home.rglob("*") if path.is_file()]
    return folder, records(folder), elsewhere, (prepared.model, results)


def curve(history, axis, name):
    return [(r["item"][axis], r["item"][name]) for r in history if name in r["item"]]


def test_metrics_are_curves_over_tasks_and_steps(run):
    _, kept, _, (_, results) = run
    history = kept["history"]
    traces = [fisher["trace"] for fisher in results["fisher"]]
    assert curve(history, "task", "fisher/trace") == list(enumerate(traces))
    for name in ("drift", "eval/average_accuracy", "eval/accuracy/task01", "fisher/seconds"):
        assert [task for task, _ in curve(history, "task", name)] == [0, 1]
    for layer, values in results["fisher"][1]["layers"].items():
        assert curve(history, "task", f"fisher/layer_trace/{layer}")[1] == (1, values["trace"])
        largest = curve(history, "task", f"fisher/largest_eigenvalue/{layer}")[1]
        assert largest == (1, values["eigenvalues"][0])
    every = list(range(1, 51))
    for name in ("loss", "task_loss", "penalty", "accuracy", "learning_rate", "seconds_per_step"):
        assert [step for step, _ in curve(history, "step", f"train/{name}")] == every
    tenth = [10, 20, 30, 40, 50]
    assert [step for step, _ in curve(history, "step", "train/task_gradient_norm")] == tenth
    # In the first task there is no penalty.
    penalty = curve(history, "step", "train/penalty_gradient_norm")
    assert [step for step, _ in penalty] == [30, 40, 50]
    axes = {m.get("glob_name") or m["name"]: m.get("step_metric") for m in kept["metric"]}
    assert {axes["train/*"], axes["eval/*"], axes["fisher/*"], axes["drift"]} == {"step", "task"}
    hidden = {m["name"] for m in kept["metric"] if m.get("options", {}).get("hidden")}
    assert hidden == {"fisher/trace/task00", "fisher/trace/task01"}


def test_times_are_not_in_the_records(run):
    folder, *_ = run
    text = (folder / "metrics.jsonl").read_text()
    assert "seconds" not in text
    assert '"fisher/trace/task01"' in text


def test_a_run_can_be_found(run):
    _, kept, *_ = run
    about = kept["run"][0]
    words = ["benchmark=permuted_digits"]
    assert about["display_name"] == (
        "permuted_digits ewc num_tasks=2 hidden=[20] iterations=25 strength=10 seed=0"
    )
    assert {"permuted_digits", "ewc", "strength=10"} <= set(about["tags"])
    assert about["job_type"] == "train"
    assert all(word in about["notes"] for word in words)
    config = about["config"]["update"]
    assert (config["strategy"], config["benchmark"]) == ("ewc", "permuted_digits")
    assert (config["model"], config["seed"]) == ("mlp", 0)
    assert config["options"]["strategy"]["strength"] == 10


def test_artifacts_are_what_the_run_had(run):
    folder, kept, _, (model, results) = run
    aliases = {(a["type"], *sorted(a["aliases"])) for a in kept["artifact"]}
    kinds = ("model", "fisher", "penalty")
    assert aliases == {(kind, "latest", f"task{t:02d}") for kind in kinds for t in (0, 1)}
    for artifact in kept["artifact"]:
        for content in artifact["manifest"]["contents"]:
            assert Path(content["local_path"]).is_relative_to(folder)
            assert Path(content["local_path"]).is_file()
    files = folder / "wandb" / "artifacts"
    state = load_file(files / "model-task01.safetensors")
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)
    fisher = FisherMatrix.load(files / "fisher-task01.safetensors")
    assert float(fisher.trace()) == pytest.approx(results["fisher"][1]["trace"])
    penalty = EWCPenalty.load(files / "penalty-task01.safetensors")
    traces = sum(information["trace"] for information in results["fisher"])
    assert penalty.precision_trace == pytest.approx(fisher.num_examples * traces)


def test_console_and_machine_are_kept_and_nothing_is_elsewhere(run):
    folder, kept, elsewhere, _ = run
    assert "a line of the run" in "".join(o["line"] for o in kept["output_raw"])
    assert "proc.memory.rssMB" in kept["stats"][0]["item"]
    (page,) = folder.glob("wandb/offline-run-*/files/media/html/*.html")
    assert page.read_text() == "<p>shown</p>"
    assert kept["exit"][0].get("exit_code", 0) == 0
    assert elsewhere == []


def diverge(folder):
    with Recorder(folder, WandB(), {}, Label("x")) as recorder:
        recorder.log({"step": 1, "train/loss": 1.0, "train/penalty": 0.0})
        raise FloatingPointError("The loss became nan.")


def test_a_diverged_run_has_failed(tmp_path):
    with pytest.raises(FloatingPointError):
        diverge(tmp_path)
    kept = records(tmp_path)
    assert kept["exit"][0]["exit_code"] == 1
    assert kept["run"][-1]["tags"] == ["diverged"]
    assert {"diverged": "The loss became nan."} in [s.get("update") for s in kept["summary"]]


def test_a_run_that_goes_on_is_the_same_run(tmp_path):
    state = None
    for step in (1, 2):
        with Recorder(tmp_path, WandB(), {}, Label("x", group="g"), state=state) as recorder:
            recorder.log({"step": step, "train/loss": 1.0, "train/penalty": 0.0})
            state = recorder.state()
    runs = records(tmp_path)["run"]
    assert len({run["run_id"] for run in runs}) == 1
    assert {run["run_group"] for run in runs} == {"g"}
    assert len(recorder.sync_command.split()) == 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "job_type", "number"),
    [
        (WandB(), "train", 2),
        (WandB(), "sweep", 0),
        (WandB(artifacts="never"), "train", 0),
        (WandB(artifacts="always"), "sweep", 5),
        (WandB(mode="disabled", artifacts="always"), "train", 0),
    ],
)
def test_artifacts_end_where_they_take_too_much(tmp_path, monkeypatch, options, job_type, number):
    monkeypatch.setattr(wandb_run, "ARTIFACT_BYTES", 250)
    with Recorder(tmp_path, options, {}, Label("x", job_type=job_type)) as recorder:
        for task in range(5):
            recorder.artifact("model", task, lambda path: path.write_bytes(bytes(100)))
    files = sorted(path.name for path in tmp_path.glob("wandb/artifacts/*.safetensors"))
    assert files == [f"model-task{task:02d}.safetensors" for task in range(number)]


@contextlib.contextmanager
def server(fault):
    """The address of a server with a fault."""
    if fault == "failing":
        with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as failing:
            threading.Thread(target=failing.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{failing.server_port}"
            failing.shutdown()
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if fault == "silent":  # it accepts connections and never answers
            listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refusing", "silent", "failing", "killed"])
def test_a_run_goes_on_without_wandb(tmp_path, fault):
    mode = "offline" if fault == "killed" else "online"
    # Where W&B has been used in this process, its children would share its service.
    environment = {name: value for name, value in os.environ.items() if "SERVICE" not in name}
    began = time.monotonic()
    with server(fault) as address:
        done = subprocess.run(
            [sys.executable, "-c", RECORDING, tmp_path, mode, fault],
            cwd=ROOT,
            env=environment | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 90
    assert "Traceback" not in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
    said = "the end of the W&B run: " if fault == "killed" else "W&B does not take the run ("
    assert done.stderr.count(said) == 1
    command, *folders = done.stdout.split()[-2:]
    assert command == "sync"
    assert [list(Path(ROOT / folder).glob("*.wandb")) for folder in folders] != [[]]
