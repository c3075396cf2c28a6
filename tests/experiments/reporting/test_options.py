"""Jobs of one setting: they differ in the seed only, however their options are written."""

from experiments.reporting.options import by_setting, varied

OPTIONS = {
    "a": {"lr": "1e-3", "seed": "0"},
    "b": {"seed": "1", "lr": "0.001"},
    "c": {"lr": "1e-2", "seed": "0"},
    "d": {"lr": "1e-3", "model": "mine.MLP", "seed": "0"},
    "e": {"lr": "1e-3", "model": "yours.MLP", "seed": "0"},
}


def test_jobs_of_a_setting_differ_in_the_seed_only():
    assert by_setting(OPTIONS, OPTIONS.values()) == [
        ({"lr": "1e-3"}, ["a", "b"]),
        ({"lr": "1e-2"}, ["c"]),
        ({"lr": "1e-3", "model": "mine.MLP"}, ["d"]),
        ({"lr": "1e-3", "model": "yours.MLP"}, ["e"]),
    ]


def test_jobs_of_a_setting_may_differ_in_what_is_left_out():
    settings = by_setting(OPTIONS, OPTIONS.values(), but=["lr"])
    assert [jobs for _, jobs in settings] == [["a", "b", "c"], ["d"], ["e"]]


def test_options_vary_by_their_values_and_where_they_are_missing():
    assert varied([OPTIONS["a"], OPTIONS["b"]]) == ["seed"]
    assert varied([OPTIONS["a"], OPTIONS["d"]]) == ["model"]
    assert varied([OPTIONS["d"], OPTIONS["e"]]) == ["model"]
    assert varied([]) == []
