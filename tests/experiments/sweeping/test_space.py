"""The space of a search in Hydra's grammar."""

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from experiments.configuration.targets import ConfigurationError
from experiments.sweeping.space import Space

LOADER = ConfigLoaderImpl(ConfigSearchPathImpl())


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("interval(1,1000)", FloatDistribution(1, 1000)),
        ("tag(log,interval(0.1,1000))", FloatDistribution(0.1, 1000, log=True)),
        ("int(interval(16,256))", IntDistribution(16, 256)),
        ("tag(log,int(interval(16,256)))", IntDistribution(16, 256, log=True)),
        ("range(5,25,5)", IntDistribution(5, 20, step=5)),
        ("range(10,1,-3)", IntDistribution(4, 10, step=3)),
        ("range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
        ("adam,sgd", CategoricalDistribution(["adam", "sgd"])),
        ("[10],[20,20],null", CategoricalDistribution(["[10]", "[20,20]", "null"])),
        ("shuffle(range(1,4))", None),
    ],
)
def test_overrides_become_distributions(written, expected):
    space = Space.parsed(["seed=3", f"optimizer.lr={written}"], LOADER)
    found = space.distributions()["optimizer.lr"]
    if expected is None:
        expected = CategoricalDistribution(found.choices)
        assert sorted(found.choices) == ["1", "2", "3"]
    assert found == expected
    assert space.overrides({"optimizer.lr": 0.5}) == ["seed=3", "optimizer.lr=0.5"]


def test_a_later_override_of_an_option_counts():
    space = Space.parsed(["seed=1,2", "a=interval(0,1)", "seed=3", "b=1", "b=4,5"], LOADER)
    assert list(space.fixed.values()) == ["seed=3"]
    assert list(space.searched) == ["a", "b"]


def test_every_choice_is_an_example():
    space = Space.parsed(["x=1", "a=u,v,w", "b=interval(0,1)"], LOADER)
    assert space.examples() == [
        ["x=1", "a=u", "b=0.0"],
        ["x=1", "a=v", "b=0.0"],
        ["x=1", "a=w", "b=0.0"],
        ["x=1", "a=u", "b=0.0"],
        ["x=1", "a=u", "b=1.0"],
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=3"], "nothing to search over"),
        (["a=tag(log,interval(0,1))"], "'a' is searched from 0.0 to 1.0: .* positive"),
        (["a=interval(3,1)"], "'a' is searched from 3.0 to 1.0: the first must be smaller"),
        (["a=tag(linear,interval(1,3))"], "'a' has the tags linear: allowed is log"),
        (["a=tag(log,choice(1,3))"], "'a' has the tags log: allowed is log, of an interval"),
    ],
)
def test_what_is_no_space_is_named(overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        Space.parsed(overrides, LOADER)
