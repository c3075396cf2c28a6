"""How each task is trained."""

from dataclasses import dataclass

from ewc.checks import check_count, check_share


@dataclass(frozen=True)
class Training:
    """How each task is trained.

    Attributes:
        batch_size: images in a training step.
        epochs: sweeps over a task's images, where ``iterations`` is not set.
        iterations: training steps a task; ``None`` for ``epochs``.
        reset_optimizer: start every task with a fresh optimizer state.
        anneal: let the learning rate fall to 0 over every task, as half a cosine.
        tail_average: the share of a task's iterations, the last ones, over which the network
            takes the mean of its parameters; 0 leaves it those of the last one.
        eval_batch_size: images in a batch of the evaluation and of the Fisher pass.
        log_every: record one training step in so many.

    Raises:
        ValueError: a count is below 1, or the share is not in [0, 1].
    """

    batch_size: int = 128
    epochs: int = 1
    iterations: int | None = None
    reset_optimizer: bool = True
    anneal: bool = False
    tail_average: float = 0.0
    eval_batch_size: int = 1000
    log_every: int = 1

    def __post_init__(self) -> None:
        """Check the counts and the share."""
        for name in ("batch_size", "epochs", "iterations", "eval_batch_size", "log_every"):
            if (count := getattr(self, name)) is not None:
                check_count(count, name)
        check_share(self.tail_average, "tail_average")
