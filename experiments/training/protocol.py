"""How each task is trained."""

from dataclasses import dataclass

from ewc.checks import check_count, check_not_negative, check_share


@dataclass(frozen=True)
class Training:
    """How each task is trained.

    Attributes:
        batch_size: images in a training step.
        epochs: epochs per task, where ``iterations`` is ``None``.
        iterations: training steps per task; ``None`` to train for ``epochs``.
        reset_optimizer: whether every task starts with a fresh optimizer state.
        anneal: whether the learning rate falls to 0 over every task, as half a cosine.
        tail_average: the last fraction of a task's iterations over which the parameters are
            averaged; 0 for no average.
        eval_batch_size: images in a batch of the evaluation.
        log_every: training steps from one record to the next.
        checkpoint_minutes: the time from one checkpoint to the next within a task, in minutes; 0
            for one after every step, ``None`` for one after every task only.

    Raises:
        ValueError: a count is below 1, the fraction is not in [0, 1], or the time is negative.
    """

    batch_size: int = 128
    epochs: int = 1
    iterations: int | None = None
    reset_optimizer: bool = True
    anneal: bool = False
    tail_average: float = 0.0
    eval_batch_size: int = 1000
    log_every: int = 1
    checkpoint_minutes: float | None = 10.0

    def __post_init__(self) -> None:
        """Check the counts and the fraction."""
        for name in ("batch_size", "epochs", "iterations", "eval_batch_size", "log_every"):
            if (count := getattr(self, name)) is not None:
                check_count(count, name)
        check_share(self.tail_average, "tail_average")
        if self.checkpoint_minutes is not None:
            check_not_negative(self.checkpoint_minutes, "checkpoint_minutes")
