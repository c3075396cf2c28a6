"""The sweeper and the launcher of this project, as Hydra calls them.

Hydra imports this file at every start, so what is slow to import is imported in a sweep only.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Searches for the best options with Optuna; see :class:`experiments.sweeping.search.Search`.

    Args:
        options: the arguments of ``Search``, as ``hydra.sweeper`` has them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember what the jobs need."""
        from hydra.core.plugins import Plugins

        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials."""
        from experiments.configuration.schema import build
        from experiments.sweeping.search import Search

        options = {"_target_": "experiments.sweeping.search.Search", **self.options}
        assert self.config is not None
        search = build(options, Search, "hydra.sweeper", self.config.trusted)
        assert self.launcher is not None
        return search.run(arguments, self.config, self.launcher, self.validate_batch_is_legal)


class SubmititLauncher(Launcher):
    """Runs jobs with submitit; see :class:`experiments.sweeping.submitted.Submission`.

    Args:
        options: the arguments of ``Submission``, as ``hydra.launcher`` has them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember what the jobs need."""
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs, and wait for all of them."""
        from experiments.configuration.schema import build
        from experiments.sweeping.submitted import Submission

        options = {"_target_": "experiments.sweeping.submitted.Submission", **self.options}
        assert self.config is not None
        submission = build(options, Submission, "hydra.launcher", self.config.trusted)
        return submission.run(
            job_overrides, initial_job_idx, self.hydra_context, self.config, self.task_function
        )
