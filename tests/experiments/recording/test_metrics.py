"""The figures of merit, worked out by hand."""

import pytest

from experiments.recording.metrics import average_accuracy, backward_transfer, forgetting

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
