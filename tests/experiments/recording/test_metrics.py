"""The figures of merit, worked out by hand."""

import pytest

from experiments.recording.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    unlearnt,
)

MATRIX = [
    [0.90, 0.10, 0.20],
    [0.95, 0.80, 0.30],
    [0.70, 0.60, 0.85],
]


def test_figures_of_three_tasks():
    assert average_accuracy(MATRIX) == pytest.approx((0.70 + 0.60 + 0.85) / 3)
    # The first task was best after the second: 0.95.
    assert forgetting(MATRIX) == pytest.approx(((0.95 - 0.70) + (0.80 - 0.60)) / 2)
    assert backward_transfer(MATRIX) == pytest.approx(((0.70 - 0.90) + (0.60 - 0.80)) / 2)


def test_only_tasks_seen_so_far_count():
    assert average_accuracy(MATRIX[:2]) == pytest.approx((0.95 + 0.80) / 2)
    assert forgetting(MATRIX[:2]) == pytest.approx(0.90 - 0.95)


def test_luck_before_training_is_not_forgotten():
    # The second task was at 0.9 by chance before it was learnt to 0.8.
    assert forgetting([[1.0, 0.9, 0.0], [1.0, 0.8, 0.0], [1.0, 0.7, 1.0]]) == pytest.approx(0.05)


def test_one_task_forgets_nothing():
    assert forgetting(MATRIX[:1]) == 0.0
    assert backward_transfer(MATRIX[:1]) == 0.0
    assert average_accuracy(MATRIX[:1]) == 0.90


def test_intransigence_is_what_new_tasks_are_under_the_reference():
    joint = [[0.92, 0.1, 0.1], [0.9, 0.90, 0.1], [0.9, 0.9, 0.89]]
    expected = ((0.92 - 0.90) + (0.90 - 0.80) + (0.89 - 0.85)) / 3
    assert intransigence(MATRIX, joint) == pytest.approx(expected)
    assert intransigence(MATRIX, MATRIX) == 0.0


def test_forward_transfer_is_gained_before_a_task_is_learnt():
    initial = [0.5, 0.08, 0.12]
    expected = ((0.10 - 0.08) + (0.30 - 0.12)) / 2
    assert forward_transfer(MATRIX, initial) == pytest.approx(expected)
    assert forward_transfer(MATRIX[:1], initial) is None


def diagonal(*accuracies):
    """A matrix with these accuracies of just learnt tasks."""
    size = len(accuracies)
    return [[value if i == j else 0.0 for j in range(size)] for i, value in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "tasks"),
    [
        ((0.97, 0.95, 0.60), []),
        ((0.97, 0.38, 0.40), [1]),  # 28 and 30 points above chance, where a third is 29
        ((0.97, 0.27, 0.14), [1, 2]),
        ((0.11, 0.97, 0.12), [0, 2]),  # within three standard errors of chance
        ((0.14, 0.14, 0.14), []),
    ],
)
def test_a_learnt_task_is_beyond_chance_and_a_third_as_far_as_the_first(accuracies, tasks):
    guessing = [{"accuracy": 0.1, "error": 0.01}] * 3
    assert unlearnt(diagonal(*accuracies), guessing) == tasks
