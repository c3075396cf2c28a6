"""Configurations: every shipped one builds, every mistake is named, and none runs code."""

import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from ewc import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenvalueCorrected,
    Empirical,
    Implicit,
    Kronecker,
    LowRank,
    MonteCarlo,
)
from experiments.configuration.command_line import CONFIGS, flags_first
from experiments.configuration.schema import build, plain, same_outcome
from experiments.configuration.targets import ConfigurationError
from experiments.experiment import Experiment
from experiments.strategies.batch_means import BatchMeanGradients
from experiments.strategies.fisher import Fisher

OPTIONS = [
    f"{path.parent.relative_to(CONFIGS).as_posix()}={path.stem}"
    for path in sorted(Path(CONFIGS).glob("*/**/*.yaml"))
    if path.relative_to(CONFIGS).parts[0] not in ("hydra", "wandb_sweep")
]


def compose(*overrides):
    return deepcopy(_composed(os.environ.get("WANDB_MODE"), *overrides))


@cache
def _composed(_environment, *overrides):
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return plain(hydra.compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_configuration_builds(option):
    assert isinstance(build(compose(option), Experiment), Experiment)


@pytest.mark.parametrize(
    "strategy",
    ["naive", "joint", "ewc", "online_ewc", "si", "mas", "l2", "lwf", "pseudo_rehearsal"],
)
@pytest.mark.parametrize("experiment", ["permuted_mnist", "split_mnist"])
def test_every_recipe_takes_every_strategy(experiment, strategy):
    built = build(compose(f"experiment={experiment}", f"strategy={strategy}"), Experiment)
    assert type(built.strategy).__name__.lower() == strategy.replace("_", "")


def test_options_reach_their_objects():
    experiment = build(
        compose(
            "benchmark=split_digits",
            "benchmark.scenario=class",
            "strategy=online_ewc",
            "strategy.strength=7",
            "strategy.decay=0.5",
            "fisher/estimator=monte_carlo",
            "fisher/structure=dense",
            "fisher.estimator.num_samples=3",
            "model.hidden=[5,6]",
            "optimizer=sgd",
            "optimizer.lr=0.5",
            "training.iterations=9",
            "seed=4",
        ),
        Experiment,
    )
    assert experiment.benchmark.scenario == "class"
    (plugin,) = experiment.strategy.plugins(experiment.fisher)
    assert plugin.penalty.strength == 7
    assert plugin.penalty.consolidation.decay == 0.5
    assert plugin.estimator == MonteCarlo(3, seed=4)
    assert plugin.structure == Dense()
    assert experiment.model.hidden == [5, 6]
    optimizer = experiment.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5
    assert (experiment.training.iterations, experiment.seed) == (9, 4)


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo", "empirical"])
@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ("diagonal", Diagonal()),
        ("block_diagonal", BlockDiagonal()),
        ("kronecker", Kronecker()),
        ("eigenvalue_corrected", EigenvalueCorrected()),
        ("low_rank", LowRank(rank=20, oversampling=10, seed=0)),
        ("dense", Dense()),
        ("implicit", Implicit()),
    ],
)
def test_ewc_takes_every_estimator_with_every_structure(estimator, structure, expected):
    choices = (f"fisher/estimator={estimator}", f"fisher/structure={structure}")
    experiment = build(compose("strategy=ewc", *choices), Experiment)
    (plugin,) = experiment.strategy.plugins(experiment.fisher)
    assert plugin.structure == expected
    assert type(plugin.estimator).__name__.lower() == estimator.replace("_", "")


def test_batch_means_are_diagonal_only():
    experiment = build(compose("strategy=ewc", "fisher/estimator=batch_means"), Experiment)
    (plugin,) = experiment.strategy.plugins(experiment.fisher)
    assert isinstance(plugin.estimator, Empirical)
    assert plugin.structure == BatchMeanGradients()
    node = compose("fisher/estimator=batch_means", "fisher/structure=kronecker")["fisher"]
    with pytest.raises(ConfigurationError, match=r"=batch_means, got Kronecker\("):
        build(node, Fisher)


def test_options_of_a_structure_reach_it_or_are_named():
    node = compose("fisher/structure=low_rank", "fisher.structure.rank=7")["fisher"]
    assert build(node, Fisher).structure == LowRank(rank=7, oversampling=10, seed=0)
    node["structure"]["ranks"] = 7
    message = "Unknown option 'structure.ranks': allowed are structure.rank, structure.oversampling"
    with pytest.raises(ConfigurationError, match=message):
        build(node, Fisher)


def test_the_target_of_an_estimator_may_be_changed():
    node = compose()["fisher"] | {"estimator": {"_target_": "ewc.Empirical"}}
    assert build(node, Fisher).estimator == Empirical()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"iteration": 3}}, r"'training.iteration': allowed are training.batch_size"),
        ({"seeed": 3}, "Unknown option 'seeed': allowed are benchmark, model"),
        ({"fisher": {"estimator": {"samples": 3}}}, "'fisher.estimator.samples'"),
        ({"training": {"epochs": 2.5}}, "'training.epochs' is 2.5: .* integer"),
        ({"training": {"epochs": "many"}}, "'training.epochs' is 'many': .* integer"),
        ({"training": {"epochs": 0}}, "training: epochs must be a whole number, 1 or more, got 0"),
        ({"benchmark": {"scenario": "tasks"}}, "'benchmark.scenario' .* 'task', 'domain' or 'cl"),
        ({"strategy": {"strength": "nan"}}, "strategy: strength must be .* 0 or above, got nan"),
        ({"strategy": {"strength": -1}}, "strategy: strength must .*, got -1"),
        ({"optimizer": {"lr": "fast"}}, "'optimizer.lr' is 'fast'"),
        ({"optimizer": {"rate": 1}}, "'optimizer.rate': allowed are optimizer.lr, optim"),
        ({"wandb": {"mode": "of"}}, "'wandb.mode' is 'of': .* 'offline', 'online' or 'disabled'"),
        ({"strategy": {"_targt_": 1}}, "Unknown option 'strategy._targt_'"),
        ({"optimizer": {"params": 1}}, "Unknown option 'optimizer.params'"),
        ({"device": "tpu9"}, "device must be .*, got 'tpu9'"),
        ({"seed": -1}, "seed must .*, got -1"),
        ({"threads": 0}, "threads must .*, got 0"),
        ({"model": {"hidden": [0]}}, "model: hidden must .* 1 or more, got"),
        ({"model": {"_target_": "experiments.training.models.CNN"}}, "'model._target_' is"),
    ],
)
def test_mistakes_are_named(change, message):
    config = OmegaConf.to_container(OmegaConf.merge(compose(), change))
    with pytest.raises(ConfigurationError, match=message):
        build(config, Experiment)


@pytest.mark.parametrize("group", ["strategy", "training", "model", "fisher", "wandb", "benchmark"])
def test_groups_without_a_target_are_refused(group):
    config = compose()
    del config[group]["_target_"]
    with pytest.raises(ConfigurationError, match=f"Option '{group}' has no _target_"):
        build(config, Experiment)


def test_missing_options_are_named():
    config = compose()
    del config["model"]
    with pytest.raises(ConfigurationError, match="'model' is missing"):
        build(config, Experiment)


def test_missing_values_are_named():
    with pytest.raises(ConfigurationError, match="Missing mandatory value: seed"):
        plain(OmegaConf.create({"seed": "???"}))


def test_what_does_not_decide_the_outcome_makes_no_other_experiment():
    config = compose("strategy=ewc")
    assert same_outcome(config, compose("strategy=ewc", "data_root=/elsewhere"))
    assert same_outcome(config, compose("strategy=ewc", "wandb.mode=disabled"))
    for other in ("seed=1", "device=cpu", "threads=2", "strategy.strength=3", "optimizer=sgd"):
        assert not same_outcome(config, compose("strategy=ewc", other))
    assert not same_outcome(config, compose("strategy=online_ewc"))


def test_an_option_that_there_was_not_yet_had_its_default():
    config = compose("strategy=ewc")
    older = compose("strategy=ewc")
    del older["training"]["anneal"], older["strategy"]["shrinkage"], older["benchmark"]["num_tasks"]
    assert same_outcome(older, config)
    assert same_outcome(config, older)
    for other in ("training.anneal=true", "strategy.shrinkage=0.9", "benchmark.num_tasks=2"):
        assert not same_outcome(older, compose("strategy=ewc", other))
        assert not same_outcome(compose("strategy=ewc", other), older)
    del older["optimizer"]["fused"]  # torch's own default is another
    assert not same_outcome(older, config)
    # What has no default is no option that can be left out.
    del (other := compose("strategy=ewc"))["benchmark"]["images"]["_target_"]
    assert not same_outcome(other, config)


# --- no code from configurations ----------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module whose import, and whose functions, leave a file that is returned."""
    trace = tmp_path / "trace"
    (tmp_path / "foreign.py").write_text(
        f"""
import logging
from pathlib import Path
from hydra.experimental.callback import Callback
from experiments.strategies.ewc import EWC

def leave(*args, **kwargs):
    Path({str(trace)!r}).touch()

class Own(EWC):
    pass

class Other(Callback):
    pass

class Handler(logging.StreamHandler):
    pass

leave()
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield trace
    sys.modules.pop("foreign", None)


OBJECTS = ["benchmark", "model", "optimizer", "training", "strategy", "fisher", "wandb"]
OBJECTS += ["benchmark.images", "fisher.likelihood", "fisher.estimator", "fisher.structure"]
VALUES = ["seed", "data_root", "device", "threads", "model.hidden", "training.iterations"]
VALUES += ["training.anneal", "strategy.strength", "optimizer.lr", "optimizer.betas", "wandb.tags"]


@pytest.mark.parametrize("partial", [False, True], ids=["", "partial"])
@pytest.mark.parametrize("place", OBJECTS + VALUES)
def test_targets_of_foreign_modules_are_refused_before_their_import(foreign, place, partial):
    config = OmegaConf.create(compose())
    node = {"_target_": "foreign.leave"} | ({"_partial_": True} if partial else {})
    OmegaConf.update(config, place, node, merge=False, force_add=True)
    with pytest.raises(ConfigurationError, match=f"Option '{place}(._target_)?' "):
        build(plain(config), Experiment)
    assert not foreign.exists()


@pytest.mark.parametrize("target", ["ewc.Exact", "builtins.int", "pathlib.Path", "torch.tensor"])
@pytest.mark.parametrize("place", VALUES)
@pytest.mark.parametrize("nest", [lambda n: n, lambda n: [1, n], lambda n: {"a": [{"b": n}]}])
def test_values_are_never_built(place, target, nest):
    config = OmegaConf.create(compose())
    OmegaConf.update(config, place, nest({"_target_": target}), merge=False, force_add=True)
    message = f"Option '{place}' names the target '{target}': it takes a value"
    with pytest.raises(ConfigurationError, match=message):
        build(plain(config), Experiment)


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "experiments.run.main",
        "experiments.tasks.images.os.system",
        "experiments.recording.tracking.Recorder",
        "ewc.fisher_information",
        "ewc.FisherMatrix.load",
        "torch.nn.Linear",
    ],
)
@pytest.mark.parametrize("place", OBJECTS)
def test_only_classes_that_fit_their_place_are_called(place, target):
    config = OmegaConf.create(compose())
    OmegaConf.update(config, f"{place}._target_", target)
    message = f"Option '{place}._target_' is '{target}': allowed are .* and its subclasses"
    with pytest.raises(ConfigurationError, match=message):
        build(plain(config), Experiment)


@pytest.mark.parametrize(
    "target", ["experiments.training.models.MLP", "experiments.run.main", "os.getcwd"]
)
def test_the_whole_is_of_the_class_that_is_wanted(target):
    with pytest.raises(ConfigurationError, match="Option '_target_' is"):
        build(compose() | {"_target_": target}, Experiment)


@pytest.mark.parametrize(
    ("place", "node", "message"),
    [
        ("model", {"_target_": "experiments.training.models.MLP", "_partial_": True}, "Network"),
        ("optimizer", {"_target_": "torch.optim.SGD", "lr": 0.1}, "partial.*Optimizer"),
    ],
)
def test_an_object_and_a_partial_are_told_apart(place, node, message):
    config = OmegaConf.create(compose())
    OmegaConf.update(config, place, node, merge=False)
    with pytest.raises(ConfigurationError, match=f"Option '{place}' must be .*{message}"):
        build(plain(config), Experiment)


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "SGD", "Adagrad", "NAdam"])
def test_every_optimizer_of_torch_may_be_named(name):
    config = compose()
    config["optimizer"] = {"_target_": f"torch.optim.{name}", "_partial_": True, "lr": 0.5}
    optimizer = build(config, Experiment).optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.defaults["lr"] == 0.5


def test_trusted_modules_may_be_named(foreign):
    config = compose("trusted=[foreign]") | {"strategy": {"_target_": "foreign.Own"}}
    assert type(build(config, Experiment).strategy).__name__ == "Own"
    # The kind is checked all the same, and no other module is meant.
    config["strategy"]["_target_"] = "foreign.Other"
    with pytest.raises(ConfigurationError, match=r"allowed are .*\.Strategy and"):
        build(config, Experiment)
    config["strategy"]["_target_"] = "foreigner.Own"
    with pytest.raises(ConfigurationError, match=r"avalanche, timm, foreign and modules"):
        build(config, Experiment)
    config["seed"] = {"_target_": "foreign.leave"}
    with pytest.raises(ConfigurationError, match="'seed' names the target"):
        build(config | {"strategy": {"_target_": "foreign.Own"}}, Experiment)


@pytest.mark.parametrize("trusted", ["foreign", 3, [3], {"a": "b"}])
def test_trusted_is_a_list_of_names(trusted):
    with pytest.raises(ConfigurationError, match="Option 'trusted' is"):
        build(compose() | {"trusted": trusted}, Experiment)


def test_comparing_results_imports_nothing(foreign):
    config = compose() | {"strategy": {"_target_": "foreign.leave"}}
    assert same_outcome(config, config)
    assert not same_outcome(config, config | {"strategy": {"_target_": "foreign.leave", "a": 1}})
    assert not foreign.exists()


def test_secrets_of_the_environment_are_not_read(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for name in ("${oc.env:WANDB_API_KEY}", "${oc.env:${oc.decode:WANDB_API_KEY},none}"):
        with pytest.raises(ConfigurationError, match="'WANDB_API_KEY' is not read: allowed") as no:
            compose(f"wandb.name='{name}'")
        assert "secret" not in str(no.value)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb = compose("wandb.name='${oc.env:SLURM_JOB_ID}'")["wandb"]
    assert (wandb["name"], wandb["mode"]) == ("17", "disabled")


RECIPES = {
    "value": ("seed: {_target_: foreign.leave}", "Option 'seed' names the target"),
    "trusted": (
        "trusted: [foreign]\nstrategy: {_target_: foreign.Own}",
        "'trusted' is ['foreign'] where the command line has []",
    ),
    "trusted later": (
        "trusted: ${oc.dict.keys:${more}}\nmore: {foreign: 1}",
        "where the command line has []",
    ),
    "trusted by a sweep": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {trusted: '[foreign]'}}}",
        "'trusted' is ['foreign'] where the command line has []",
    ),
    "callback": (
        "hydra: {callbacks: {x: {_target_: foreign.leave}}}",
        "'hydra.callbacks.x._target_' is 'foreign.leave'",
    ),
    "callback elsewhere": (
        "more: {_target_: foreign.leave}\nhydra: {callbacks: {x: '${more}'}}",
        "'hydra.callbacks.x._target_' is 'foreign.leave'",
    ),
    "callback of another kind": (
        "hydra: {callbacks: {x: {_target_: experiments.tasks.images.os.system, command: exit}}}",
        "'hydra.callbacks.x._target_' is 'experiments.tasks.images.os.system'",
    ),
    "within a callback": (
        "hydra: {callbacks: {report: {pictures: [{_target_: foreign.leave}]}}}",
        "'hydra.callbacks.report.pictures.0._target_' is 'foreign.leave'",
    ),
    "launcher": (
        "hydra: {mode: MULTIRUN, launcher: {_target_: foreign.leave}}",
        "'hydra.launcher._target_' is 'foreign.leave'",
    ),
    "sweeper": (
        "hydra: {mode: MULTIRUN, sweeper: {_target_: foreign.leave}}",
        "'hydra.sweeper._target_' is 'foreign.leave'",
    ),
    "logging factory": (
        "hydra: {job_logging: {handlers: {console: {(): foreign.leave}}}}",
        "'hydra.job_logging.handlers.console.()' is 'foreign.leave'",
    ),
    "logging class": (
        "hydra: {hydra_logging: {handlers: {console: {class: foreign.Handler}}}}",
        "'hydra.hydra_logging.handlers.console.class' is 'foreign.Handler'",
    ),
    "logging reference": (
        "hydra: {job_logging: {handlers: {console: {stream: 'ext://foreign.leave'}}}}",
        "'hydra.job_logging.handlers.console.stream' is 'ext://foreign.leave'",
    ),
    "logging elsewhere": (
        "more: 'ext://foreign.leave'\n"
        "hydra: {job_logging: {handlers: {console: {stream: '${more}'}}}}",
        "'hydra.job_logging.handlers.console.stream' is '${more}'",
    ),
    "log over a file": (
        "hydra: {job_logging: {handlers: {file: {filename: FOLDER/trace, mode: w}}}}",
        "'hydra.job_logging.handlers.file.filename' is ",
    ),
    "environment": (
        "hydra: {job: {env_set: {LD_PRELOAD: foreign.so}}}",
        "'hydra.job.env_set' is not taken",
    ),
    "environment copied": (
        "hydra: {job: {env_copy: [PATH]}}",
        "'hydra.job.env_copy' is not taken",
    ),
}


def run_recipe(folder, text, experiment="given", *options):
    """Run a recipe that a user was given."""
    path = folder / "configs" / "experiment" / "given.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{text}\n".replace("FOLDER", str(folder)))
    return subprocess.run(
        [
            *(sys.executable, "-m", "experiments.run", "--config-dir", str(folder / "configs")),
            *(f"experiment={experiment}", "training.iterations=1", "benchmark.num_tasks=1"),
            *("wandb.mode=disabled", f"hydra.run.dir={folder / 'run'}"),
            *(f"hydra.sweep.dir={folder / 'run'}", *options),
        ],
        cwd=Path(CONFIGS).parent,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", [*list(RECIPES)[:2], *(pytest.param(kind, marks=SLOW) for kind in list(RECIPES)[2:])]
)
def test_recipes_run_no_code(tmp_path, foreign, kind):
    text, message = RECIPES[kind]
    refused(run_recipe(tmp_path, text), foreign, message)


def test_recipes_of_a_job_run_no_code(tmp_path, foreign):
    """A sweep over recipes composes each of them for its job only."""
    text, message = RECIPES["logging factory"]
    refused(run_recipe(tmp_path, text, "split_mnist,given", "-m"), foreign, message)


@pytest.mark.slow
def test_the_command_line_trusts_modules(tmp_path, foreign):
    text = "strategy: {_target_: foreign.Own}\nhydra: {callbacks: {x: {_target_: foreign.Other}}}"
    done = run_recipe(tmp_path, text, "given", "trusted=[foreign]")
    assert done.returncode == 0, done.stderr
    assert foreign.exists()
    assert "average accuracy" in done.stdout


def refused(done, trace, message):
    assert not trace.exists()
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sorted_ones"),
    [
        (["strategy=naive,ewc", "-m", "seed=0,1"], ["-m", "strategy=naive,ewc", "seed=0,1"]),
        (["seed=1", "--cfg", "job", "-p", "model", "threads=2", "seed=0"],
         ["--cfg", "job", "-p", "model", "seed=1", "threads=2", "seed=0"]),
        (["a=1", "--config-dir=a=1", "a=1", "--multirun"],
         ["--config-dir=a=1", "--multirun", "a=1", "a=1"]),
        (["resume=there"], ["resume=there"]),
        ([], []),
    ],
)  # fmt: skip
def test_flags_may_stand_anywhere(arguments, sorted_ones):
    assert flags_first(arguments) == sorted_ones
