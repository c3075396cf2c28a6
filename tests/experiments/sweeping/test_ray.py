"""Jobs on a Ray cluster that runs already; Ray needs an environment of its own."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SMALL = ["benchmark=permuted_digits", "benchmark.num_tasks=2", "model.hidden=[10]"]
SMALL += ["training.iterations=2", "strategy=naive", "wandb.mode=disabled"]
RAY = ["-m", "hydra/launcher=ray_cluster"]
IS_THERE = importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+hydra.launcher.ray.init.runtime_env={pip:[x]}", "init.runtime_env' is not taken"),
        ("+hydra.launcher.ray.remote.runtime_env={pip:[x]}", "remote.runtime_env' is not taken"),
        ("+hydra.launcher.ray.cluster={a:1}", "ray.cluster.a' is not taken: allowed are none"),
    ],
)
def test_ray_is_told_little(tmp_path, command_line, option, message):
    code, _, err = command_line(*RAY, option, *SMALL, "seed=0,1", f"hydra.sweep.dir={tmp_path}/s")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(IS_THERE, reason="hydra-ray-launcher is installed")
def test_a_missing_plugin_is_named_with_its_extra(tmp_path, command_line):
    code, _, err = command_line(*RAY, *SMALL, "seed=0,1", f"hydra.sweep.dir={tmp_path}/s")
    assert (code, err) == (
        1,
        "error: hydra_plugins.hydra_ray_launcher is not installed: pip install -e '.[ray]' "
        "installs it.\n",
    )


@pytest.mark.slow
@pytest.mark.skipif(not IS_THERE, reason="hydra-ray-launcher is not installed: extra ray")
def test_a_sweep_runs_on_a_cluster_that_is_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    start += ["--include-dashboard=false", "--disable-usage-stats"]
    cluster = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in cluster.stdout:
        if "Ray runtime started" in line:
            break
    try:
        command = [sys.executable, "-m", "experiments.run", *RAY, *SMALL, "seed=0,1,-1"]
        command += [f"hydra.launcher.ray.init.address=127.0.0.1:{port}"]
        command += [f"hydra.sweep.dir={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        cluster.terminate()
        cluster.communicate()
    assert done.returncode == 1, done.stderr
    assert "error: 1 job of the sweep failed: job 2 (" in done.stderr
    assert sorted(path.parent.name for path in tmp_path.glob("*/results.json")) == ["0", "1"]
