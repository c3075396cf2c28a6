"""Any option: an experiment, or one sentence that names the option; and no file elsewhere."""

import copy
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import hydra
import pytest
from hostile import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import build, plain
from experiments.configuration.targets import ConfigurationError
from experiments.experiment import Experiment

ROOT = Path(CONFIGS).parent
SLOW = pytest.mark.slow

STARTS = [
    (),
    ("strategy=kfac_ewc", "strategy/update=paced"),
    ("benchmark=permuted_mnist", "optimizer=sgd", "strategy=online_ewc"),
    ("strategy=si", "fisher/structure=low_rank", "fisher/estimator=monte_carlo"),
    ("strategy=lwf", "model.dropout=0.1"),
]
VALUES = [
    *(None, -1, 0, 1, 2, True, False, 1.5, -0.5, math.nan, math.inf, 2**31, 2**63, 10**30),
    *("", "x", "1", "-1", "nan", "null", "${seed}", "cpu", "meta", "cuda:99", "auto", "~root"),
    *("../../etc/passwd", "/dev/full", "é" * 50, "\u202e", "\ud800", "x" * 10_000, "a\nb", "\x00"),
    *([], [1], [0], [-1], ["x"], [[1]], [10**11], [1] * 1000, {}, {"a": 1}, {"_partial_": True}),
    *({"_target_": t} for t in (None, "", ["x"], "torch", "torch.optim.", "ewc..Exact", "ewc")),
    {"_target_": "os.system", "command": "exit"},
    {"_target_": "experiments.training.models.MLP"},
    {"_target_": "torch.nn.Linear", "in_features": 10**9, "out_features": 10**9},
    {"_target_": "torch.optim.SGD", "_partial_": "x"},
]
KEYS = ["extra", "_args_", "_convert_", "_recursive_", "hydra", "self", "", "a.b", "é"]


@cache
def composed(*overrides):
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return plain(hydra.compose("config", overrides=list(overrides)))


def places(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


@st.composite
def configurations(draw):
    """A configuration with one to three options that are replaced, removed or added."""
    config = copy.deepcopy(composed(*draw(st.sampled_from(STARTS))))
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(list(places(config))))
        holder, kind = config, draw(st.sampled_from(["put", "put", "put", "remove", "add"]))
        for part in path:
            holder = holder[part]
        if kind == "remove":
            del holder[key]
        elif kind == "put" or isinstance(holder, list):
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        else:
            holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if not config:
            break
    return config


def check_configuration(config):
    before = copy.deepcopy(config)
    experiment, error = outcome(lambda: build(config, Experiment), (ConfigurationError,))
    assert repr(config) == repr(before)
    assert isinstance(experiment, Experiment) or type(error) is ConfigurationError


@given(configurations())
@settings(max_examples=150)
def test_any_configuration_builds_or_is_refused_in_a_sentence(config):
    check_configuration(config)


@SLOW
@given(configurations())
@settings(max_examples=1000)
def test_any_of_many_configurations_builds_or_is_refused(config):
    check_configuration(config)


# --- the command line -------------------------------------------------------------------------

OPTIONS = ["seed", "data_root", "device", "threads", "model.hidden", "training.iterations"]
OPTIONS += ["strategy.strength", "optimizer.lr", "optimizer.betas", "benchmark.num_tasks"]
OPTIONS += ["wandb.mode", "fisher/structure", "strategy", "experiment", "+extra", "hydra.run.dir"]
TEXTS = ["", "null", "-1", "1e400", "nan", "x", "[]", "[1,", "{a:1}", "${seed}", "${oc.env:HOME}"]
TEXTS += ["{_target_:os.getcwd}", "../../x", "é", "x" * 5000, "'a b'", "1,2", "???", "true", "~"]


@SLOW
@given(st.sampled_from(OPTIONS), st.sampled_from(TEXTS), st.sampled_from(["split_digits", "x"]))
@settings(max_examples=8)
def test_the_command_line_ends_in_one_message(command_line, tmp_path_factory, option, text, name):
    """In this process; the benchmark that is missing ends a run before it trains."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "other").touch()
    code, out, err = command_line(
        f"{option}={text}",
        f"benchmark={name}",
        *("benchmark.num_tasks=1000", "wandb.mode=disabled", f"hydra.run.dir={folder / 'run'}"),
    )
    assert code not in (0, None)
    assert "Traceback" not in err + out
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert [p.name for p in folder.iterdir()] == ["other"]


RECIPES = {
    "run folder": ("hydra: {run: {dir: FOLDER/outside}}", "hydra.run.dir"),
    "run folder above": ("hydra: {run: {dir: ../outside}}", "hydra.run.dir"),
    "home": ("hydra: {run: {dir: '~/outside'}}", "hydra.run.dir"),
    "by the environment": ("hydra: {run: {dir: '${oc.env:HOME}/outside'}}", "hydra.run.dir"),
    "by a way round": ("hydra: {run: {dir: '${more}'}}\nmore: ../outside", "hydra.run.dir"),
    "by the job's name": (
        "hydra: {job: {name: ../../outside}, run: {dir: 'x/${hydra.job.name}'}}",
        "hydra.run.dir",
    ),
    "by a time": ("hydra: {run: {dir: '${now:../outside}'}}", "hydra.run.dir"),
    "line break": ('hydra: {sweep: {dir: "x\\nls #"}}', "hydra.sweep.dir"),
    "sweep folder": ("hydra: {sweep: {dir: ../outside}}", "hydra.sweep.dir"),
    "job folder": ("hydra: {sweep: {subdir: ../../outside}}", "hydra.sweep.subdir"),
    "kept": ("hydra: {callbacks: {report: {kept: ../outside}}}", "hydra.callbacks.report.kept"),
    "joblib": (
        "defaults: [{override /hydra/launcher: joblib}]\n"
        "hydra: {launcher: {temp_folder: ../outside}}",
        "hydra.launcher.temp_folder",
    ),
    "Ray": (
        "defaults: [{override /hydra/launcher: ray_cluster}]\n"
        "hydra: {launcher: {ray: {init: {address: 'elsewhere:6379'}}}}",
        "hydra.launcher.ray.init.address",
    ),
    "Ray without an address": (
        "defaults: [{override /hydra/launcher: ray_cluster}]\n"
        "hydra: {launcher: {ray: {init: null}}}",
        "hydra.launcher.ray.init.address",
    ),
    "data": ("data_root: FOLDER/outside", "data_root"),
    "data above": ("data_root: a/../../outside", "data_root"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_folders_of_files_lie_inside(command_line, tmp_path, monkeypatch, kind):
    (tmp_path / "here" / "configs" / "experiment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    text, option = RECIPES[kind]
    path = tmp_path / "here" / "configs" / "experiment" / "given.yaml"
    path.write_text(f"# @package _global_\n{text}\n".replace("FOLDER", str(tmp_path)))
    where = ("--config-dir", str(tmp_path / "here" / "configs"))
    few = ("training.iterations=1", "benchmark.num_tasks=1", "wandb.mode=disabled")
    code, _, err = command_line(*where, "experiment=given", *few)
    assert code == 1
    assert f"error: Option '{option}' is" in err
    assert "a file may not choose" in err
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@SLOW
def test_no_secret_is_written_or_printed(tmp_path):
    """Neither that of the environment nor one that an option, or a file, has by mistake."""
    secrets = {kind: f"{kind}{'0123456789abcdef' * 3}"[:40] for kind in ("env", "opt", "file")}
    path = tmp_path / "configs" / "experiment" / "given.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\nwandb: {{api_key: {secrets['file']}}}\n")
    environment = {**os.environ, "WANDB_API_KEY": secrets["env"], "WANDB_MODE": "offline"}
    few = ["training.iterations=2", "benchmark.num_tasks=1", "model.hidden=[4]"]
    printed = ""
    codes = []
    for arguments in (
        [],
        [f"+wandb.api_key={secrets['opt']}"],
        [f"wandb.api_key={secrets['opt']}"],
        ["--config-dir", str(tmp_path / "configs"), "experiment=given"],
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "experiments.run", *arguments, *few),
                f"hydra.run.dir={tmp_path / f'run{len(codes)}'}",
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append(done.returncode)
        printed += done.stdout + done.stderr
    assert codes == [0, 1, 1, 1], printed
    assert "Traceback" not in printed
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != path]
    assert len(written) > 5
    for secret in secrets.values():
        assert secret not in printed
        assert not [p for p in written if secret.encode() in p.read_bytes()]
