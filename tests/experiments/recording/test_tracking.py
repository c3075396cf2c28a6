"""W&B that is out of reach, slow, failing or killed: the run goes on, and its copy is on disk."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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
