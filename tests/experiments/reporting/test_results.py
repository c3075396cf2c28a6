"""RESULTS.md: its table of goals, and pictures that show the numbers of the jobs."""

import math
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.configuration.command_line import CONFIGS
from experiments.configuration.schema import plain
from experiments.configuration.targets import ConfigurationError
from experiments.recording.metrics import average_accuracies, average_accuracy
from experiments.reporting import sweep_pictures as pictures
from experiments.reporting.goals import Goal, decades_within, goals_table, leads_over
from experiments.reporting.options import has_options, options_of
from experiments.reporting.recipes import as_configured, of_recipe, report_of
from experiments.reporting.results_page import main, missing_table, section
from experiments.reporting.tables import markdown, sweep_table


def job(accuracy, **settings):
    """A finished job; ``strength`` and ``square`` stand for the options of that name."""
    names = {"strength": "strategy.strength", "square": "benchmark.square"}
    options = [f"{names.get(name, name)}={value}" for name, value in settings.items()]
    return {
        "overrides": options,
        "average_accuracy": accuracy,
        "seed": settings.get("seed", 0),
        "forgetting": 0.0,
        "seconds": {"total": 1.0},
        "config": {"strategy": {"strength": float(settings.get("strength", 1))}},
        "accuracy_matrix": [[0.9, 0.1], [accuracy - 0.1, accuracy + 0.1]],
        "fisher_overlap": [{"0": 1.0, "2": 1.0}, {"0": accuracy, "2": 1.0}],
    }


def curve(values, **settings):
    """Strengths of 1, 10, 100, ..., as Hydra writes them; ``None`` diverged."""
    return [
        job(v / 100, strength=float(10**k), seed=0, **settings)
        for k, v in enumerate(values)
        if v is not None
    ]


@pytest.mark.parametrize(
    ("accuracies", "decades"),
    [
        ([80, 98.5, 99.4, 99.3, 98.6, 97], 3),  # 1e1 to 1e4
        ([80, 90, 99, 80], 0),
        ([99, 80, 99.5, 98.6, 99], 2),  # the longest run, without gaps
        ([99, 99, 99], 2),
        ([99, 99, None, 99, 99, 99], 2),  # what diverged is no bridge
    ],
)
def test_decades_are_the_longest_run_of_strengths_near_the_best(accuracies, decades):
    assert decades_within(curve(accuracies), 1.0) == decades


def test_goals_are_compared_with_the_mean_of_their_jobs():
    jobs = {
        "recipe": [
            job(0.95, strategy="ewc", seed=0),
            job(0.97, strategy="ewc", seed=1),
            job(0.10, strategy="naive", seed=0),
        ],
        "curve": curve([80, 98.5, 99.4]),
    }
    of_jobs = {"name": "a", "published": 94, "recipe": "recipe", "settings": {"strategy": "ewc"}}
    of_curve = {"name": "a", "published": 94, "recipe": "curve"}
    goals = [
        Goal(**of_jobs, at_least=96.0),
        Goal(**of_jobs, at_least=96.1, remark=["Because.", "And so."]),
        Goal(**of_jobs),
        Goal(name="a", published=94, at_least=1, recipe="absent"),
        Goal(**of_curve, at_least=1, decades=True),
        Goal(**of_curve, at_most=1, default=10),
        Goal(**of_curve, at_most=0.8, default=10),
        Goal(**of_curve, at_most=1, default=100),
        Goal(**of_curve, at_most=1, default=3),
        Goal(name="b", at_least=93.8, values=[93, 95]),
    ]
    lines = goals_table(goals, jobs)
    end = lines.index("")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]
    assert lines[end + 1 :] == ["- a", "  - Because.", "  - And so."]
    assert [row[2:] for row in cells] == [
        ["96.0", "96.00 (2 seeds)", "yes"],
        ["96.1", "96.00 (2 seeds)", "no"],
        ["", "96.00 (2 seeds)", ""],
        ["1", "not run", ""],
        ["1", "1 (strengths in steps of ten)", "yes"],
        ["1", "0.90 under the best of 3 strengths (1 to 100, 1 seed)", "yes"],
        ["0.8", "0.90 under the best of 3 strengths (1 to 100, 1 seed)", "no"],
        ["1", "0.00 under the best of 3 strengths (1 to 100, 1 seed)", ""],  # at the edge
        ["1", "not run", ""],
        ["93.8", "94.00 (2 seeds)", "yes"],
    ]


def test_strengths_are_compared_on_the_seeds_that_both_have():
    jobs = [
        job(0.80, strength=3, seed=0),
        job(0.90, strength=3, seed=1),
        job(0.85, strength=10, seed=0),  # 5 over, where the means of all say none
        job(0.91, strength=30, seed=0),
        job(0.70, strength=30, seed=1),
        job(0.99, strength=100, seed=2),  # nothing to compare with
    ]
    leads = leads_over(jobs, 3)
    assert list(leads) == [3, 10, 30]
    assert [pytest.approx(of_strength) for of_strength in leads.values()] == [
        [0, 0],
        [5],
        [11, -20],
    ]
    assert leads_over(jobs, 7) == {}


def test_a_table_has_its_columns_and_rows():
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_averages_so_far_end_with_the_average():
    matrix = [[0.9, 0.2, 0.3], [0.5, 0.7, 0.1], [0.3, 0.6, 0.9]]
    assert average_accuracies(matrix) == pytest.approx([0.9, 0.6, 0.6])
    assert average_accuracy(matrix) == average_accuracies(matrix)[-1]


def drawn(figure):
    """The lines of all panels: label, x and y."""
    return [
        (line.get_label(), list(line.get_xdata()), pytest.approx(list(line.get_ydata())))
        for axes in figure.axes
        for line in axes.lines
    ]


TWO = [job(a, strategy=s, seed=k) for s, k, a in [("ewc", 0, 0.6), ("ewc", 1, 0.8), ("l2", 0, 0.5)]]


def test_each_of_many_settings_has_a_line_of_its_own():
    (axes,) = pictures.over_tasks([job(0.5, strategy=f"s{k}") for k in range(12)], "t").axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == 12


def test_accuracy_is_drawn_over_tasks():
    assert drawn(pictures.over_tasks(TWO, "t")) == [
        ("ewc", [1, 2], [90, 70]),
        ("l2", [1, 2], [90, 50]),
    ]


def test_scenarios_have_a_panel_each_and_strategies_one_colour():
    def scenario(name, strategy):
        found = job(0.6, strategy=strategy)
        return found | {"overrides": [*found["overrides"], f"benchmark.scenario={name}"]}

    jobs = [scenario("task", "ewc"), scenario("task", "l2"), scenario("class", "l2")]
    first, second = pictures.over_tasks(jobs, "t").axes
    assert (first.get_title(), second.get_title()) == ("task", "class")
    assert [line.get_label() for line in first.lines] == ["ewc", "l2"]
    assert [line.get_label() for line in second.lines] == ["l2"]
    assert second.lines[0].get_color() == first.lines[1].get_color()


def test_accuracy_is_drawn_for_single_tasks():
    assert drawn(pictures.over_single_tasks(TWO, "t")) == [
        ("ewc", [1, 2], [90, 60]),
        ("l2", [1, 2], [90, 40]),
        ("ewc", [2], [80]),
        ("l2", [2], [60]),
    ]


def test_accuracy_is_drawn_over_strength():
    of = "fisher/estimator"
    jobs = curve([80, 90], **{of: "exact"}) + curve([70, 60], **{of: "empirical"})
    figure = pictures.over_strength(jobs, "t")
    assert drawn(figure) == [
        ("exact", [1, 10], [80, 90]),
        ("empirical", [1, 10], [70, 60]),
    ]
    assert figure.axes[0].get_xscale() == "log"


def test_overlap_is_drawn_by_layer():
    jobs = [job(a, square=s, seed=k) for s, k, a in [(8, 0, 0.4), (8, 1, 0.6), (26, 0, 0.1)]]
    figure = pictures.overlap_by_layer(jobs, "t")
    containers = figure.axes[0].containers
    assert [c.get_label() for c in containers] == ["benchmark.square=8", "benchmark.square=26"]
    assert list(containers[0].lines[0].get_ydata()) == pytest.approx([0.5, 1.0])
    (segments,) = containers[0].lines[2]
    low, high = (point[1] for point in segments.get_segments()[0])
    assert high - low == pytest.approx(2 * 0.1)  # a standard error up and down
    assert math.isclose(containers[1].lines[0].get_ydata()[0], 0.1)


RECIPES = sorted((Path(CONFIGS) / "experiment").glob("*.yaml"))


def sweep_of(recipe):
    """The overrides of all jobs of a recipe, as Hydra's own sweeper makes them."""
    params = OmegaConf.load(recipe).get("hydra", {}).get("sweeper", {}).get("params", {})
    overrides = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    return [
        {"overrides": job}
        for batch in BasicSweeper.split_arguments(overrides, None)
        for job in batch
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_published_figures_and_goals_are_of_jobs_that_a_recipe_runs(recipe):
    jobs = sweep_of(recipe)
    assert of_recipe(jobs[::-1], recipe) == jobs
    for setting in report_of(recipe).get("published", {}):
        wanted = dict(pair.split("=") for pair in setting.split(","))
        assert any(has_options(options_of(job), wanted) for job in jobs), setting
    for entry in OmegaConf.load(Path(CONFIGS).parent / "results" / "goals.yaml"):
        goal = Goal(**entry)
        if goal.recipe == recipe.stem:
            assert any(has_options(options_of(job), goal.settings) for job in jobs), goal.name
            if goal.default is not None:
                chosen = f"strategy={goal.settings['strategy']}"
                with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
                    config = hydra.compose("config", overrides=[chosen])
                assert goal.default == config.strategy.strength, goal.name


def test_other_seeds_and_options_are_no_jobs_of_a_recipe():
    recipe = Path(CONFIGS) / "experiment" / "split_digits_strategies.yaml"
    own = {"overrides": ["strategy=ewc", "seed=1"]}
    others = [
        {"overrides": ["strategy=ewc", "seed=100"]},
        {"overrides": ["strategy=ewc", "seed=1", "training.epochs=1"]},
        {"overrides": ["strategy=ewc", "seed=1", "~wandb"]},
        {"overrides": ["seed=1"]},
    ]
    assert of_recipe([own, *others], recipe) == [own]


def test_jobs_from_before_a_default_changed_are_left_out():
    recipe = Path(CONFIGS) / "experiment" / "split_digits_strategies.yaml"
    jobs = []
    for seed in ("1", "2"):
        options = ["strategy=kfac_ewc", f"seed={seed}"]
        with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
            config = hydra.compose("config", overrides=[f"experiment={recipe.stem}", *options])
        jobs.append({"overrides": options, "seed": int(seed), "config": plain(config)})
    assert as_configured(jobs, recipe) == jobs
    jobs[0]["config"]["data_root"] = "elsewhere"  # decides nothing
    jobs[1]["config"]["strategy"]["strength"] += 1
    assert as_configured(jobs, recipe) == jobs[:1]


def test_what_diverged_has_a_row_and_no_accuracy():
    jobs = [job(0.5, strength=1, seed=0), job(0.7, strength=1, seed=1)]
    jobs += [{"diverged": "in task 2", "overrides": ["strategy.strength=1"], "seed": 2}]
    jobs += [{"diverged": "in task 2", "overrides": ["strategy.strength=10"], "seed": 0}]
    _, rows = sweep_table(jobs)
    assert rows == [
        ["1", "0 to 2", "60.00 ± 10.00 (1 diverged)", "0.00 ± 0.00", "1.0"],
        ["10", "0", "diverged", "", ""],
    ]


def test_a_recipe_whose_jobs_all_diverged_has_a_table_and_no_picture(tmp_path):
    recipe = Path(CONFIGS) / "experiment" / "split_digits_strategies.yaml"
    jobs = [{"diverged": "in task 2", "overrides": ["strategy=ewc"], "seed": 2}]
    assert "| ewc | 2 | diverged |" in section(jobs, recipe, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Path", "np.savetxt", "draw_accuracy_matrix", "over_nothing"])
def test_a_recipe_asks_for_pictures_of_sweeps_only(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "given.yaml"
    recipe.write_text(f"# Given.\nhydra: {{callbacks: {{report: {{pictures: [{name}]}}}}}}\n")
    with pytest.raises(
        ConfigurationError, match=f"a picture must be one of over_tasks.*, got '{name}'"
    ):
        section([job(0.5, strength=1, seed=0) | {"versions": {}}], recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["given.yaml"]


def test_what_is_missing_is_counted_against_the_sweep():
    recipe = Path(CONFIGS) / "experiment" / "strength_split_mnist_domain.yaml"
    options = ["benchmark.scenario=domain", "strategy=kfac_ewc"]
    kept = [{"overrides": [*options, f"strategy.strength={s}"]} for s in (3, 10)]
    lines = missing_table([recipe], {recipe.stem: kept})
    # 1 scenario, 1 strategy, 3 strengths and 6 seeds
    assert lines[-1] == "| strength_split_mnist_domain | 2 | 18 | strategy.strength=30 |"


def test_a_sweep_without_missing_jobs_is_not_listed():
    recipe = Path(CONFIGS) / "experiment" / "split_digits_strategies.yaml"
    jobs = sweep_of(recipe)
    assert missing_table([recipe], {recipe.stem: jobs}) == []
    lines = missing_table([recipe], {recipe.stem: jobs[1:]})
    assert lines[-1] == f"| split_digits_strategies | {len(jobs) - 1} | {len(jobs)} |  |"


def test_a_page_is_written_without_damaged_lines(tmp_path, monkeypatch, capsys, caplog):
    damaged = tmp_path / "results" / "split_digits_strategies.jsonl"
    damaged.parent.mkdir()
    damaged.write_text("{\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["results"])
    main()
    assert capsys.readouterr().out == "RESULTS.md: 0 tables\n"
    assert f"Line 1 of {damaged.relative_to(tmp_path)} is damaged" in caplog.text


def test_numbers_are_written_short():
    jobs = [job(0.5, strength=1e11), job(0.6, strength=0.3)]
    _, rows = sweep_table(jobs)
    assert [row[0] for row in rows] == ["1e+11", "0.3"]
