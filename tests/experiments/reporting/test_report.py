"""The report over any set of runs: its numbers, and a page that opens anywhere."""

import csv
import json
import re
import shlex
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from experiments import report
from experiments.recording.results import read_jobs
from experiments.recording.sweep import begin_sweep, note_job
from experiments.reporting.report.gathering import gather
from experiments.reporting.report.measures import Estimate, ranked, summary
from experiments.reporting.report.page import write_report
from experiments.reporting.report.pictures import left_out, pictures_of
from experiments.reporting.report.settings import by_benchmark
from experiments.reporting.report.svg import SERIES, drawn_for_a_page

VERSIONS = {"python": "3.11", "torch": "2.14"}


def results(strategy="ewc", seed=0, matrix=((0.9, 0.1), (0.8, 0.9)), **others):
    """The content of a ``results.json``."""
    matrix = [list(row) for row in matrix]
    options = others.pop("options", {})
    config = {
        "benchmark": {
            "_target_": "experiments.tasks.benchmarks.Split",
            "images": {"_target_": "experiments.tasks.images.Digits"},
            "num_tasks": 2,
            "scenario": "domain",
            **others.pop("benchmark", {}),
        },
        "strategy": {"_target_": f"experiments.strategies.{strategy.upper()}", **options},
        "training": {"iterations": 100, **others.pop("training", {})},
        "seed": seed,
    }
    return {
        "average_accuracy": sum(matrix[-1]) / len(matrix),
        "forgetting": matrix[0][0] - matrix[1][0],
        "backward_transfer": matrix[1][0] - matrix[0][0],
        "accuracy_matrix": matrix,
        "seconds": {"train": 1.0, "fisher": 2.0, "eval": 0.5, "total": 4.0},
        "versions": VERSIONS,
        "config": config,
        "overrides": [f"strategy={strategy}", f"seed={seed}"],
        "seed": seed,
        **others,
    }


def write(folder, *jobs):
    """A sweep's folder with these jobs."""
    for number, job in enumerate(jobs):
        directory = folder / str(number)
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(json.dumps(job))
    return folder


NAIVE = [
    results("naive", 0, ((0.92, 0.1), (0.40, 0.94))),
    results("naive", 1, ((0.94, 0.1), (0.50, 0.96))),
]
EWC = [
    results("ewc", 0, ((0.90, 0.2), (0.80, 0.80))),
    results("ewc", 1, ((0.90, 0.3), (0.84, 0.84))),
]
JOINT = [results("joint", 0, ((0.92, 0.1), (0.92, 0.90)))]


def measured(folder, *jobs):
    """The rows of the one benchmark of these jobs, by setting, and the two lines."""
    (benchmark,) = by_benchmark(gather([write(folder, *jobs)]).runs)
    ranking = ranked(benchmark)
    return {row.setting.name: row for row in ranking.rows}, summary(ranking), ranking


def close(mean, error, count):
    """The estimate with these numbers, up to rounding."""
    return Estimate(pytest.approx(mean), error and pytest.approx(error), count)


def test_measures_are_means_over_seeds_with_standard_errors(tmp_path):
    rows, _, _ = measured(tmp_path, *NAIVE, *EWC)
    assert list(rows) == ["ewc", "naive"]
    # 80 and 84: they differ from their mean by 2, so the error of the mean is 2.
    assert rows["ewc"].accuracy == close(82, 2, 2)
    assert rows["ewc"].forgetting == close(8, 2, 2)
    assert rows["naive"].accuracy == close(70, 3, 2)
    assert rows["ewc"].seconds == close(4, 0.0, 2)
    assert rows["ewc"].memory is rows["ewc"].forward_transfer is None


def test_intransigence_is_against_joint_where_it_ran_with_the_same_seed(tmp_path):
    rows, _, ranking = measured(tmp_path, *NAIVE, *EWC, *JOINT)
    assert ranking.reference == "joint"
    # On seed 0 alone: (92 - 90 + 90 - 80) / 2 and (92 - 92 + 90 - 94) / 2.
    assert rows["ewc"].intransigence == close(6, None, 1)
    assert rows["naive"].intransigence == close(-2, None, 1)
    assert rows["joint"].intransigence is None


def test_intransigence_is_against_naive_where_there_is_no_joint(tmp_path):
    rows, _, ranking = measured(tmp_path, *NAIVE, *EWC)
    assert ranking.reference == "naive"
    # (2 + 14) / 2 on seed 0 and (4 + 12) / 2 on seed 1.
    assert rows["ewc"].intransigence == close(8, 0.0, 2)
    assert rows["naive"].intransigence is None


def test_a_reference_of_other_training_is_none(tmp_path):
    longer = results("joint", 0, training={"iterations": 200})
    rows, lines, _ = measured(tmp_path, EWC[0], longer)
    assert set(rows) == {"ewc, iterations 100", "joint, iterations 200"}
    assert rows["ewc, iterations 100"].intransigence is None
    assert "under joint" not in lines[1]


def test_forward_transfer_is_against_the_untrained_network(tmp_path):
    jobs = [job | {"initial_accuracies": [0.1, 0.15]} for job in EWC]
    rows, _, _ = measured(tmp_path, *jobs)
    assert rows["ewc"].forward_transfer == close((5 + 15) / 2, 5, 2)


@pytest.mark.parametrize(
    ("jobs", "lines"),
    [
        (
            [*NAIVE, *EWC, *JOINT],
            [
                "Best: ewc, 82.0 ± 2.0 % average accuracy (2 seeds).",
                "12.0 ± 1.0 points over naive and 11.0 points under joint, on the same seeds.",
            ],
        ),
        (
            EWC,
            [
                "ewc, 82.0 ± 2.0 % average accuracy (2 seeds).",
                "Nothing to compare it with: run naive and joint with the same seeds.",
            ],
        ),
        (
            [*EWC, *(results("l2", k, ((0.9, 0.2), (0.78, 0.82 + k / 20))) for k in range(2))],
            [
                "Best: ewc, 82.0 ± 2.0 % average accuracy (2 seeds); not clearly above l2.",
                "0.8 points over the next, l2.",
            ],
        ),
        (JOINT, ["joint, 91.0 % average accuracy (1 seed).",
                 "Nothing to compare it with: run naive and joint with the same seeds."]),
        ([{"diverged": "in task 2", "config": {}, "overrides": [], "seed": 0}],
         ["No run has finished."]),
    ],
    ids=["references", "alone", "near", "joint", "diverged"],
)  # fmt: skip
def test_two_lines_say_what_is_best(tmp_path, jobs, lines):
    assert measured(tmp_path, *jobs)[1] == lines


def test_settings_are_told_apart_by_what_differs(tmp_path):
    jobs = [results("ewc", options={"strength": s, "decay": 1.0}) for s in (1.0, 1e11)]
    rows, _, _ = measured(tmp_path, *jobs, results("l2", options={"strength": 0.1}))
    assert set(rows) == {"ewc, strength 1", "ewc, strength 1e+11", "l2"}


def test_a_run_from_before_an_option_existed_has_its_default(tmp_path):
    target = {"_target_": "experiments.training.protocol.Training", "iterations": 100}
    older = results("ewc", 0, training=target)
    newer = results("ewc", 1, training=target | {"tail_average": 0.0})
    other = results("ewc", 1, training=target | {"tail_average": 0.5})
    rows, _, _ = measured(tmp_path, older, newer, other)
    assert {name: row.setting.seeds for name, row in rows.items()} == {
        "ewc, tail_average 0": [0, 1],
        "ewc, tail_average 0.5": [1],
    }


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [(1.25, None, "1.2"), (-0.04, 0.02, "0.0 ± 0.0"), (-1.26, 0.1, "\N{MINUS SIGN}1.3 ± 0.1")],
)
def test_an_estimate_is_written_without_a_negative_zero(mean, error, text):
    assert Estimate(mean, error, 2).text() == text


def test_benchmarks_are_not_compared(tmp_path):
    other = results("ewc", benchmark={"scenario": "class"})
    benchmarks = by_benchmark(gather([write(tmp_path, EWC[0], other)]).runs)
    assert [(b.name, len(b.settings)) for b in benchmarks] == [
        ("split_digits, 2 tasks, domain-incremental", 1),
        ("split_digits, 2 tasks, class-incremental", 1),
    ]


def test_a_run_that_is_found_twice_counts_once(tmp_path):
    sweep = write(tmp_path / "sweep", *EWC)
    assert len(gather([sweep, tmp_path, sweep / "1"]).runs) == 2
    copied = write(tmp_path / "copy", *EWC)
    (benchmark,) = by_benchmark(gather([sweep, copied]).runs)
    assert ranked(benchmark).rows[0].accuracy == close(82, 2, 2)


def test_jobs_of_an_earlier_sweep_in_the_folder_do_not_count(tmp_path):
    sweep = write(tmp_path / "sweep", *EWC, *NAIVE)
    begin_sweep(sweep, ["strategy=ewc"])
    for job in ("0", "1"):
        note_job(sweep, sweep / job)
    assert [run.results for run in gather([tmp_path]).runs] == EWC


def test_jobs_in_folders_of_folders_count(tmp_path):
    """As with ``hydra.sweep.subdir=${strategy}/${seed}``."""
    sweep = tmp_path / "sweep"
    write(sweep / "ewc", *EWC)
    write(sweep / "naive", *NAIVE)
    begin_sweep(sweep, ["strategy=ewc"])
    for job in ("ewc/0", "ewc/1"):
        note_job(sweep, sweep / job)
    assert [run.results for run in gather([tmp_path]).runs] == EWC
    assert read_jobs(sweep) == EWC


class Page(HTMLParser):
    """The page, after a check that every element is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.scripts, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href"):
                self.addresses.append(value)
        if tag == "script":
            self.scripts.append(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(folder):
    return Page((folder / "report.html").read_text())


def spectra(trace):
    layer = {"trace": trace, "ranks": [1, 2, 4], "eigenvalues": [trace, trace / 2, 0.0]}
    empty = layer | {"trace": 0.0, "eigenvalues": [0.0, 0.0, 0.0]}
    return {"trace": trace, "seconds": 1.0, "layers": {"0": layer, "2": layer, "4": empty}}


EVERYTHING = [
    *NAIVE,
    *JOINT,
    *(
        job
        | {
            "fisher": [spectra(3.0), spectra(2.0)],
            "fisher_overlap": [{"0": 1.0, "2": 1.0}, {"0": 0.4, "2": 0.9}],
            "memory": {"peak": 300_000_000},
            "initial_accuracies": [0.1, 0.1],
            "remarks": ["The <strength> is too high."],
        }
        for job in (
            results("ewc", seed, ((0.9, 0.2), (0.8, 0.8 + seed / 20)), options={"strength": s})
            for s in (1.0, 10.0)
            for seed in (0, 1)
        )
    ),
    {
        "diverged": "in task 2", "overrides": ["strategy=ewc"], "seed": 2,
        "config": results("ewc", 2, options={"strength": 10.0})["config"],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A report with every part, over a sweep with every kind of job."""
    folder = write(tmp_path_factory.mktemp("report") / "a sweep #1", *EVERYTHING)
    (folder / "failed.txt").write_text("job 9 (strategy=si): memory & patience are exhausted\n")
    (folder / "10").mkdir()
    (folder / "10" / "results.json").write_text("{")
    assert write_report([folder], folder) == len(EVERYTHING)
    return folder


def test_a_page_is_whole_and_needs_nothing_else(everything):
    page = page_of(everything)
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        if address.startswith("#"):
            assert address[1:] in page.ids, address
        elif not address.startswith("data:image/png;base64,"):
            assert ":" not in address
            assert (everything / unquote(address)).exists(), address
    assert page.scripts == [[]]  # its own, inline
    style = (everything / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", style)


def test_a_page_shows_every_part(everything):
    words = " ".join(page_of(everything).words)
    for part in (
        "Best: ewc, strength 1", "What went wrong", "The <strength> is too high.", "(1 diverged)",
        "Diverged: in task 2", "forgetting (points)", "intransigence (points)", "memory (MB)",
        "forward transfer (points)", "measured against joint", "Accuracy against tasks seen",
        "Accuracy against the strength", "Fisher spectra: ewc, strength 1", "Time", "Memory",
        "Fisher overlap by layer", "python -m experiments.run strategy=ewc seed=0", "torch 2.14",
        "Failed: a sweep #1: job 9 (strategy=si): memory & patience are exhausted",
        "10/results.json is damaged",
    ):  # fmt: skip
        assert part in words, part


def test_every_picture_is_there_as_png(everything):
    names = {path.name for path in (everything / "pictures").iterdir()}
    kinds = {re.sub(r"^benchmark1_|(_\d+)?\.png$", "", name) for name in names}
    assert kinds == {
        "accuracy_over_tasks", "forgetting", "strength", "matrix", "spectra", "overlap", "seconds",
        "memory",
    }  # fmt: skip


def test_pictures_take_the_colours_of_the_page(everything):
    text = (everything / "report.html").read_text()
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not [colour for colour in SERIES if colour in drawn]
    for scheme in text.partition("prefers-color-scheme: dark")[::2]:
        assert all(f"--series-{place}: #" in scheme for place in range(len(SERIES)))


def test_points_say_their_numbers(everything):
    text = (everything / "report.html").read_text()
    assert "<title>naive, task 2: 70.0 ± 3.0 %</title>" in text
    assert "<title>ewc, strength 10: memory" not in text


def test_tables_have_the_numbers(everything):
    with (everything / "settings.csv").open() as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert float(rows["naive"]["accuracy (%)"]) == pytest.approx(70)
    assert float(rows["naive"]["accuracy standard error"]) == pytest.approx(3)
    assert rows["joint"]["accuracy standard error"] == rows["joint"]["memory (MB)"] == ""
    with (everything / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == len(EVERYTHING)
    assert {run["folder"] for run in runs} == {str(number) for number in range(len(EVERYTHING))}
    assert [run["diverged"] for run in runs].count("in task 2") == 1


def test_an_error_of_zero_is_a_number(tmp_path):
    write_report([write(tmp_path, results("ewc", 0), results("ewc", 1))], tmp_path)
    with (tmp_path / "settings.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["accuracy standard error"] == "0.0"


def test_hostile_names_stay_text(tmp_path):
    evil = "<script>alert(1)</script>"
    job = results(evil, options={"note": '"><img src=x>'}) | {
        "remarks": [evil], "versions": {evil: evil}, "overrides": [f"strategy={evil}", "a='b c'"],
        "fisher_overlap": [{evil: 1.0}, {evil: 0.5}],
        "fisher": [{"trace": 1.0, "seconds": 1.0, "layers": {
            evil: {"trace": 1.0, "ranks": [1], "eigenvalues": [1.0]}}}],
    }  # fmt: skip
    folder = write(tmp_path / "<b>&", job, job | {"seed": 1, "config": job["config"] | {"seed": 1}})
    write_report([folder], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert evil not in text
    assert "<img" not in text
    page = page_of(tmp_path / "out")
    assert evil in " ".join(page.words)
    command = next(word for word in page.words if word.startswith("python -m"))
    assert shlex.split(command)[3:] == job["overrides"]


def test_a_name_is_no_formula(tmp_path):
    jobs = [results("ewc", choices={"strategy": r"a$\frac$b", "benchmark": "x"}), *NAIVE]
    assert write_report([write(tmp_path, *jobs)], tmp_path) == 3
    assert r"a$\frac$b" in (tmp_path / "report.html").read_text()


def test_kept_results_are_runs_too(tmp_path):
    kept = tmp_path / "recipe.jsonl"
    kept.write_text("".join(json.dumps(job) + "\n" for job in [*EWC, *NAIVE]) + "{\n")
    assert write_report([kept], tmp_path / "out") == 4
    words = " ".join(page_of(tmp_path / "out").words)
    assert "Best: ewc, 82.0 ± 2.0 %" in words
    assert "Line 5 of" in words


def test_runs_that_all_diverged_have_a_page_without_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "benchmark1_seconds.png").touch()  # of an earlier report
    write_report([write(tmp_path / "sweep", EVERYTHING[-1])], tmp_path)
    assert "No run has finished." in " ".join(page_of(tmp_path).words)
    assert list((tmp_path / "pictures").iterdir()) == []


def test_many_settings_are_all_ranked_and_the_best_and_the_references_drawn(tmp_path):
    jobs = [
        results("ewc", options={"strength": float(s)}, matrix=((0.9, 0.1), (0.5 + s / 100, 0.9)))
        for s in range(30)
    ]
    _, _, ranking = measured(tmp_path, *jobs, *NAIVE)
    assert len(ranking.rows) == 31
    assert left_out(ranking) == 21
    with drawn_for_a_page():
        titles = [
            picture.title for picture in pictures_of(ranking, "p") if "matrix" in picture.name
        ]
    assert titles == [*(f"ewc, strength {s}" for s in range(29, 20, -1)), "naive"]


# --- the command line ---------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """``python -m experiments.report`` in this process: its status, and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        code = 0
        try:
            report.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return call


def test_one_folder_takes_the_report_in(ended, tmp_path):
    folder = write(tmp_path / "sweep", *EWC)
    code, said = ended(folder)
    assert code == 0
    assert said.splitlines()[-1] == "2 runs: sweep/report.html"
    assert {"report.html", "report.md", "runs.csv", "settings.csv"} <= {
        path.name for path in folder.iterdir()
    }


def test_one_run_is_enough(ended, tmp_path):
    folder = write(tmp_path, EWC[0]) / "0"
    assert ended(folder) == (0, "1 run: 0/report.html\n")


def test_several_folders_have_a_report_of_their_own(ended, tmp_path):
    first, second = write(tmp_path / "a", EWC[0]), write(tmp_path / "b", EWC[1])
    assert ended(first, second) == (0, "2 runs: report/report.html\n")


def test_links_lead_from_any_folder_to_the_runs(ended, tmp_path):
    folder = write(tmp_path / "a", EWC[0])
    assert ended(folder, "--output", "x/y") == (0, "1 run: x/y/report.html\n")
    addresses = page_of(tmp_path / "x/y").addresses
    assert "../../a/0/results.json" in addresses
    for address in addresses:
        if not address.startswith(("#", "data:")):
            assert (tmp_path / "x/y" / unquote(address)).exists(), address


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "error: there is no finished run in empty: a run leaves a results.json."),
        (["away"], "error: away does not exist: DIR is a folder with finished runs."),
        (["sweep", "--output", "file"], "error: file/pictures: Not a directory; --output=DIR"),
    ],
)
def test_a_wrong_folder_is_one_sentence(ended, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write(tmp_path / "sweep", *EWC)
    code, said = ended(*arguments)
    assert code.startswith(message)
    assert said == ""
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file", "sweep"}


def test_another_file_is_refused_in_one_sentence(ended, tmp_path):
    (tmp_path / "notes.md").write_text("one\ntwo\n")
    code, said = ended("notes.md")
    assert code.startswith("error: notes.md is a file: DIR is a folder with finished runs, or a")
    assert said == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
