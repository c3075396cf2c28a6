"""How a search chooses the next trial."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


class Sampler(ABC):
    """A choice of sampler; its random numbers are those of a seed."""

    @abstractmethod
    def built(self, seed: int) -> Any:
        """Optuna's sampler."""


@dataclass(frozen=True)
class Bayesian(Sampler):
    """The tree-structured Parzen estimator.

    It draws from where the density of good trials is high compared with that of the others.

    Attributes:
        startup_trials: the number of random trials before.

    Source:
        Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011, section 4.

    Raises:
        ValueError: the number is negative.
    """

    startup_trials: int = 5

    def __post_init__(self) -> None:
        """Check the number."""
        if self.startup_trials < 0:
            raise ValueError(f"startup_trials must not be negative, got {self.startup_trials}.")

    def built(self, seed: int) -> Any:
        import optuna

        # Trials that run side by side keep away from each other.
        return optuna.samplers.TPESampler(
            n_startup_trials=self.startup_trials, constant_liar=True, seed=seed
        )


@dataclass(frozen=True)
class Random(Sampler):
    """Independent draws from the whole space."""

    def built(self, seed: int) -> Any:
        import optuna

        return optuna.samplers.RandomSampler(seed=seed)
