"""Jobs that submitit runs: in processes of this machine, and through a Slurm that is imitated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.recording.sweep import failures

ROOT = Path(__file__).parents[3]
SMALL = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[10]"]
SMALL += ["strategy=naive", "wandb.mode=disabled"]


def wait_for(condition, process, seconds=200):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def records(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_a_job_is_queued_again_and_one_that_dies_is_named(tmp_path, command_line):
    """Job 0 is pre-empted, job 1 is killed, and job 2 has finished before."""
    sweep = ["-m", "hydra/launcher=submitit_local", *SMALL, "seed=0,1,2"]
    sweep += ["training.iterations=1500", f"hydra.sweep.dir={tmp_path}/sweep"]
    single = [*SMALL, "training.iterations=1500"]
    for seed, into in ((2, "sweep/2"), (0, "whole")):
        assert command_line(*single, f"seed={seed}", f"hydra.run.dir={tmp_path}/{into}")[0] == 0
    done = (tmp_path / "sweep/2/results.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "experiments.run", *sweep]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    pids = {}
    for job, number in (("0", signal.SIGUSR2), ("1", signal.SIGKILL)):
        folder = tmp_path / "sweep" / job
        wait_for(lambda folder=folder: records(folder) > 20, process)
        pids[job] = json.loads((folder / "run.json").read_text())["pid"]
        os.kill(pids[job], number)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "error: 1 job of the sweep failed: job 1 (" in err
    assert "the process ended without a result" in err
    assert "Traceback" not in err
    log = (tmp_path / "sweep/0/run.log").read_text()
    assert "SIGUSR2: the run stops in task" in log
    again = json.loads((tmp_path / "sweep/0/run.json").read_text())["pid"]
    assert again != pids["0"]
    assert results(tmp_path / "sweep/0") == results(tmp_path / "whole")
    assert records(tmp_path / "sweep/0") == records(tmp_path / "whole")
    assert len(list((tmp_path / "sweep" / ".submitit").glob("*/*.pkl"))) > 0
    before = (tmp_path / "sweep/0/results.json").stat().st_mtime_ns
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert failures(tmp_path / "sweep") == []
    assert (tmp_path / "sweep/0/results.json").stat().st_mtime_ns == before
    assert (tmp_path / "sweep/2/results.json").stat().st_mtime_ns == done


def results(folder):
    return json.loads((folder / "results.json").read_text())["accuracy_matrix"]


SBATCH = """#!/bin/bash
cp "$1" {folder}/script.sh
for task in 0 1; do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SUBMITIT_EXECUTOR=slurm \\
    SLURM_NTASKS=1 bash "$1" > {folder}/$task.log 2>&1 &
done
echo "Submitted batch job 7"
"""

SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == --*=* || "$1" == --unbuffered ]] || shift; shift; done
exec "$@"
"""


@pytest.mark.slow
def test_slurm_gets_one_array(tmp_path, command_line, monkeypatch):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", "#!/bin/bash\n")):
        (commands / name).write_text(text.replace("{folder}", str(tmp_path)))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.chdir(ROOT)
    options = ["hydra/launcher=slurm", "hydra.launcher.array_parallelism=1"]
    options += ["hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90"]
    options += ["hydra.launcher.gpus_per_node=1", "training.iterations=2"]
    small = [option for option in SMALL if not option.startswith("wandb")]
    code, _, err = command_line(
        "-m", *options, *small, "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert code == 0, err
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "#SBATCH --array=0-1%1",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=90",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --open-mode=append",
        "export WANDB_MODE=offline",
    ):
        assert line in script.splitlines(), script
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/*/results.json")) == ["0", "1"]
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hydra/launcher=slurm"], "There is no Slurm on this machine"),
        (["hydra/launcher=slurm", "hydra.launcher.mem_gb=much"], "'hydra.launcher.mem_gb'"),
        (
            ["hydra/launcher=slurm", 'hydra.launcher.account="a\\nrm -rf x"'],
            "account must be a word that Slurm knows",
        ),
        (["hydra/launcher=slurm", "+hydra.launcher.setup=[ls]"], "'hydra.launcher.setup'"),
        (
            ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=0.1"],
            "signal_delay_s must be shorter than timeout_min",
        ),
        (
            ["hydra/launcher=submitit_local", "hydra.launcher.array_parallelism=0"],
            "array_parallelism must be at least 1",
        ),
    ],
)
def test_what_cannot_be_submitted_is_one_sentence(
    tmp_path, command_line, monkeypatch, options, message
):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = command_line("-m", *options, *SMALL, "seed=0,1", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
