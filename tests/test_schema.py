"""Configurations: every shipped one builds, and every mistake is named."""

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from ewc import (
    BlockDiagonalFisher,
    DenseFisher,
    DiagonalFisher,
    EigenvalueCorrectedFisher,
    Empirical,
    ImplicitFisher,
    KroneckerFisher,
    LowRankFisher,
    MonteCarlo,
)
from experiments.command_line import CONFIGS
from experiments.experiment import Experiment
from experiments.schema import ConfigurationError, build, plain, same_outcome

OPTIONS = [
    f"{path.parent.relative_to(CONFIGS).as_posix()}={path.stem}"
    for path in sorted(Path(CONFIGS).glob("*/**/*.yaml"))
]


def compose(*overrides):
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return plain(hydra.compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_configuration_builds(option):
    assert isinstance(build(compose(option)), Experiment)


@pytest.mark.parametrize(
    "strategy", ["naive", "joint", "ewc", "online_ewc", "si", "mas", "l2", "lwf"]
)
@pytest.mark.parametrize("experiment", ["permuted_mnist", "split_mnist"])
def test_every_recipe_takes_every_strategy(experiment, strategy):
    built = build(compose(f"experiment={experiment}", f"strategy={strategy}"))
    assert type(built.strategy).__name__.lower() == strategy.replace("_", "")


def test_options_reach_their_objects():
    experiment = build(
        compose(
            "benchmark=split_digits",
            "benchmark.scenario=class",
            "strategy=online_ewc",
            "strategy.strength=7",
            "strategy.decay=0.5",
            "fisher=monte_carlo_dense",
            "fisher.estimator.num_samples=3",
            "model.hidden=[5,6]",
            "optimizer=sgd",
            "optimizer.lr=0.5",
            "training.iterations=9",
            "seed=4",
        )
    )
    assert experiment.benchmark.scenario == "class"
    (plugin,) = experiment.strategy.plugins(experiment.fisher)
    assert plugin.penalty.strength == 7
    assert plugin.penalty.consolidation.decay == 0.5
    assert plugin.estimator == MonteCarlo(3, seed=4)
    assert plugin.structure is DenseFisher
    assert experiment.model.hidden == [5, 6]
    optimizer = experiment.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5
    assert (experiment.training.iterations, experiment.seed) == (9, 4)


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo", "empirical"])
@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ("diagonal", DiagonalFisher),
        ("block_diagonal", BlockDiagonalFisher),
        ("kronecker", KroneckerFisher),
        ("eigenvalue_corrected", EigenvalueCorrectedFisher),
        ("low_rank", LowRankFisher.configured(rank=20, oversampling=10, seed=0)),
        ("dense", DenseFisher),
        ("implicit", ImplicitFisher),
    ],
)
def test_ewc_takes_every_estimator_with_every_structure(estimator, structure, expected):
    choices = (f"fisher/estimator={estimator}", f"fisher/structure={structure}")
    experiment = build(compose("strategy=ewc", *choices))
    (plugin,) = experiment.strategy.plugins(experiment.fisher)
    assert plugin.structure == expected
    assert type(plugin.estimator).__name__.lower() == estimator.replace("_", "")


def test_batch_means_are_of_observed_labels_only():
    node = compose("fisher=batched_diagonal", "fisher/estimator=exact")["fisher"]
    with pytest.raises(ConfigurationError, match="estimator is Exact: with BatchMeanGradients"):
        build(node)


def test_options_of_a_structure_reach_it_or_are_named():
    node = compose("fisher/structure=low_rank", "fisher.structure.rank=7")["fisher"]
    assert build(node).structure == LowRankFisher.configured(rank=7, oversampling=10, seed=0)
    assert str(LowRankFisher.configured(rank=7)) == "LowRankFisher.configured(rank=7)"
    node["structure"]["ranks"] = 7
    message = r"structure: LowRankFisher has no option 'ranks': it has rank, oversampling, seed\."
    with pytest.raises(ConfigurationError, match=message):
        build(node)


def test_the_target_of_an_estimator_may_be_changed():
    node = compose()["fisher"] | {"estimator": {"_target_": "ewc.Empirical"}}
    assert build(node).estimator == Empirical()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"iteration": 3}}, r"'training.iteration': allowed are training.batch_size"),
        ({"seeed": 3}, "Unknown option 'seeed': allowed are benchmark, model"),
        ({"fisher": {"estimator": {"samples": 3}}}, "'fisher.estimator.samples'"),
        ({"training": {"epochs": 2.5}}, "'training.epochs' is 2.5: .* integer"),
        ({"training": {"epochs": "many"}}, "'training.epochs' is 'many': .* integer"),
        ({"training": {"epochs": 0}}, "training: epochs is 0: it must be 1 or more"),
        ({"benchmark": {"scenario": "tasks"}}, "'benchmark.scenario' .* 'task', 'domain' or 'cl"),
        ({"strategy": {"strength": "nan"}}, "strategy: strength is nan: .* 0 or above"),
        ({"strategy": {"strength": -1}}, "strategy: strength is -1"),
        ({"optimizer": {"lr": "fast"}}, "'optimizer.lr' is 'fast'"),
        ({"optimizer": {"rate": 1}}, "'optimizer.rate': allowed are optimizer.lr, optim"),
        ({"wandb": {"mode": "of"}}, "'wandb.mode' is 'of': .* 'offline', 'online' or 'disabled'"),
        ({"strategy": {"_targt_": 1}}, "Unknown option 'strategy._targt_'"),
        ({"optimizer": {"params": 1}}, "Unknown option 'optimizer.params'"),
        ({"device": "tpu9"}, "device is 'tpu9'"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"model": {"hidden": [0]}}, "model: hidden is .*: every width must be 1 or more"),
        ({"model": {"_target_": "experiments.models.CNN"}}, "model._target_ is"),
    ],
)
def test_mistakes_are_named(change, message):
    config = OmegaConf.to_container(OmegaConf.merge(compose(), change))
    with pytest.raises(ConfigurationError, match=message):
        build(config)


@pytest.mark.parametrize("group", ["strategy", "training", "model", "fisher", "wandb", "benchmark"])
def test_groups_without_a_target_are_refused(group):
    config = compose()
    del config[group]["_target_"]
    with pytest.raises(ConfigurationError, match=f"Option '{group}' has no _target_"):
        build(config)


def test_missing_options_are_named():
    config = compose()
    del config["model"]
    with pytest.raises(ConfigurationError, match="'model' is missing"):
        build(config)


def test_missing_values_are_named():
    with pytest.raises(ConfigurationError, match="Missing mandatory value: seed"):
        plain(OmegaConf.create({"seed": "???"}))


def test_what_does_not_decide_the_outcome_makes_no_other_experiment():
    config = compose("strategy=ewc")
    assert same_outcome(config, compose("strategy=ewc", "data_root=/elsewhere", "threads=2"))
    assert same_outcome(config, compose("strategy=ewc", "wandb.mode=disabled"))
    for other in ("seed=1", "device=cpu", "strategy.strength=3", "optimizer=sgd"):
        assert not same_outcome(config, compose("strategy=ewc", other))
    assert not same_outcome(config, compose("strategy=online_ewc"))


def test_an_option_that_there_was_not_yet_had_its_default():
    config = compose("strategy=ewc")
    older = compose("strategy=ewc")
    del older["training"]["anneal"], older["strategy"]["rank"], older["benchmark"]["num_tasks"]
    assert same_outcome(older, config)
    assert same_outcome(config, older)
    for other in ("training.anneal=true", "strategy.rank=9", "benchmark.num_tasks=2"):
        assert not same_outcome(older, compose("strategy=ewc", other))
        assert not same_outcome(compose("strategy=ewc", other), older)
    del older["optimizer"]["fused"]  # torch's own default is another
    assert not same_outcome(older, config)
    # What has no default is no option that can be left out.
    del (other := compose("strategy=ewc"))["benchmark"]["images"]["_target_"]
    assert not same_outcome(other, config)
