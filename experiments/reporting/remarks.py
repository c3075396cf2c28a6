"""What went wrong in a run whose numbers are all finite, one sentence each."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.recording.metrics import unlearnt

NEAR_CHANCE = 0.1
"""The accuracy over fine-tuning below which a class-incremental run gets a remark."""

VANISHED = 1e-6
"""A Fisher matrix's trace relative to the largest of the run, below which it holds nothing."""


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader of a run's results should know before using them.

    Args:
        results: the content of ``results.json``; what an older version did not write is not
            judged.
    """
    rules = (_unlearnt_tasks, _idle_penalty, _vanished_fisher, _class_incremental)
    judged = (rule(results) for rule in rules)
    return [sentence for sentence in judged if sentence]


def _unlearnt_tasks(results: Mapping[str, Any]) -> str:
    """Which tasks training has left unlearnt, and what is the likely cause."""
    matrix, guessing = results["accuracy_matrix"], results.get("guessing")
    if not guessing or not (tasks := unlearnt(matrix, guessing)):
        return ""
    reached = [matrix[task][task] for task in tasks]
    ends = dict.fromkeys(f"{100 * end:.0f}" for end in (min(reached), max(reached)))
    spread = f"{' to '.join(ends)} %"
    if tasks[0] == 0:
        cause = "optimizer.lr is too small or too large, or training is too short"
        return (
            f"{_named(tasks)} reached {spread} when just learnt, no better than guessing: {cause}."
        )
    strength = results["config"].get("strategy", {}).get("strength")
    cause = "the strategy holds the parameters too firmly, or optimizer.lr does not fit"
    if strength is not None:
        cause = f"the strength of {strength:g} is too high, or optimizer.lr does not fit"
    first = f"where task 1 reached {100 * matrix[0][0]:.0f} %"
    return f"{_named(tasks)} reached {spread} when just learnt, {first}: {cause}."


def _idle_penalty(results: Mapping[str, Any]) -> str:
    """That the penalty's gradient was too small to matter in any step that was measured."""
    if not (pull := results.get("penalty_pull", 0.0)):
        return ""
    # Imported here, as it brings torch, and a report finds the sentence in the results.
    from ewc.penalty_checks import LEAST_PULL

    if pull >= LEAST_PULL:
        return ""
    strength = results["config"].get("strategy", {}).get("strength")
    advice = "" if strength is None else f": use a larger strength than {strength:g}"
    return (
        f"The penalty never mattered, as its gradient was at most {pull:.1g} times that of the "
        f"task's loss{advice}."
    )


def _vanished_fisher(results: Mapping[str, Any]) -> str:
    """Which tasks have no Fisher information beside the others."""
    traces = [task["trace"] for task in results.get("fisher", [])]
    largest = max(traces, default=0.0)
    tasks = [number for number, trace in enumerate(traces) if trace <= VANISHED * largest]
    if not tasks:
        return ""
    return (
        f"The Fisher information of {_named(tasks).lower()} is zero or nearly so, as predictions "
        "are certain, so the penalty does not hold them: fisher.likelihood.smoothing puts a floor "
        "under it."
    )


def _class_incremental(results: Mapping[str, Any]) -> str:
    """That a class-incremental run near fine-tuning is what is published for its method."""
    scenario = results["config"].get("benchmark", {}).get("scenario")
    size = len(results["accuracy_matrix"])
    near = results["average_accuracy"] < 1 / size + NEAR_CHANCE
    if scenario != "class" or size < 2 or not near:
        return ""
    return (
        f"Class-incremental: the average accuracy is near the {100 / size:.0f} % of a network that "
        "knows the last task only, as is published for methods that only protect weights, EWC "
        "among them."
    )


def _named(tasks: Sequence[int]) -> str:
    """Tasks counted from 1, those in a row as ``8 to 20``."""
    runs: list[list[int]] = []
    for task in tasks:
        if runs and task == runs[-1][-1] + 1:
            runs[-1].append(task)
        else:
            runs.append([task])
    parts = [
        f"{run[0] + 1} to {run[-1] + 1}" if len(run) > 2 else ", ".join(str(t + 1) for t in run)
        for run in runs
    ]
    return f"Task{'s' * (len(tasks) > 1)} {', '.join(parts)}"
