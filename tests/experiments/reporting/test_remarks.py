"""What is said of a run whose numbers are finite and worthless."""

import pytest

from experiments.reporting.remarks import remarks

GUESSING = {"accuracy": 0.1, "error": 0.003}


def results(*accuracies, **others):
    """A run with these accuracies of just learnt tasks, which it never forgets."""
    size = len(accuracies)
    matrix = [[value if j <= i else 0.1 for j, value in enumerate(accuracies)] for i in range(size)]
    return {
        "accuracy_matrix": matrix,
        "average_accuracy": sum(accuracies) / size,
        "guessing": [GUESSING] * size,
        "config": {"benchmark": {"scenario": "domain"}, "strategy": {"strength": 1e5}},
        **others,
    }


def test_a_run_that_learns_and_remembers_needs_no_remark():
    assert remarks(results(0.97, 0.95, 0.93)) == []


def test_tasks_that_are_no_longer_learnt_are_named():
    run = results(*[0.97] * 7, *[0.27, 0.2, 0.14], 0.9, 0.2)
    assert remarks(run) == [
        "Tasks 8 to 10, 12 reached 14 to 27 % when just learnt, where task 1 reached 97 %: the "
        "strength of 100000 is too high, or optimizer.lr does not fit."
    ]


def test_a_method_without_strength_gets_no_advice_on_it():
    config = {"benchmark": {}, "strategy": {}}
    (sentence,) = remarks(results(0.97, 0.14, config=config))
    assert sentence == (
        "Task 2 reached 14 % when just learnt, where task 1 reached 97 %: the strategy holds the "
        "parameters too firmly, or optimizer.lr does not fit."
    )


def test_a_run_that_learns_nothing_is_no_fault_of_the_strategy():
    (sentence,) = remarks(results(0.1, 0.1))
    assert sentence == (
        "Tasks 1, 2 reached 10 % when just learnt, no better than guessing: optimizer.lr is too "
        "small or too large, or training is too short."
    )


@pytest.mark.parametrize(
    ("pull", "said"),
    [
        (0.0, []),  # not measured, as with implicit steps
        (2e-4, []),
        (
            3e-6,
            [
                "The penalty never mattered, as its gradient was at most 3e-06 times that of the "
                "task's loss: use a larger strength than 100000."
            ],
        ),
    ],
)
def test_a_penalty_that_never_matters_is_said(pull, said):
    assert remarks(results(0.9, 0.9, penalty_pull=pull)) == said


@pytest.mark.parametrize(
    ("traces", "tasks"),
    [((5.0, 3.0, 0.1), None), ((5.0, 0.0, 1e-7), "tasks 2, 3"), ((0.0, 0.0), "tasks 1, 2")],
)
def test_a_vanished_fisher_is_named(traces, tasks):
    said = remarks(results(0.9, 0.9, 0.9, fisher=[{"trace": trace} for trace in traces]))
    assert [sentence.partition(" is zero")[0] for sentence in said] == (
        [f"The Fisher information of {tasks}"] if tasks else []
    )


@pytest.mark.parametrize(("scenario", "average", "said"), [
    ("class", 0.59, True), ("class", 0.61, False), ("domain", 0.5, False),
])  # fmt: skip
def test_a_class_incremental_run_near_fine_tuning_is_put_into_place(scenario, average, said):
    config = {"benchmark": {"scenario": scenario}, "strategy": {}}
    sentences = remarks(results(0.9, 0.9, average_accuracy=average, config=config))
    assert [s[:72] for s in sentences] == (
        ["Class-incremental: the average accuracy is near the 50 % of a network th"] if said else []
    )


def test_results_of_earlier_versions_are_judged_by_what_they_have():
    run = results(0.97, 0.14)
    del run["guessing"]
    assert remarks(run) == []
