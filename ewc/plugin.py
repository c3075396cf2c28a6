r"""Elastic Weight Consolidation as an Avalanche plugin.

The only file of the library that imports Avalanche.
"""

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.training import JointTraining
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from ewc.checks import check_count, check_whole
from ewc.consolidation.combination import Consolidation, Separate
from ewc.consolidation.update import InLoss, Update, check_update
from ewc.finite_steps import FiniteSteps, task_number
from ewc.fisher import Estimator, Exact, fisher_information
from ewc.fisher.estimators import check_estimator, check_no_loss
from ewc.fisher.network_state import undisturbed
from ewc.fisher.structures.diagonal import Diagonal
from ewc.fisher.structures.structure import Structure, check_structure
from ewc.growth import Growth
from ewc.likelihoods import Categorical, Likelihood, check_likelihood
from ewc.matrices import FisherMatrix
from ewc.penalty import EWCPenalty
from ewc.penalty_checks import PenaltyChecks
from ewc.strategy_calls import Batches, beside, strategy_calls
from ewc.wrappers import unwrapped

EXAMPLES_TRIED = 4
"""Approximate number of examples of the first task that are tried before training."""


class PenaltyPlugin(SupervisedPlugin, ABC):
    """A quadratic penalty for any supervised strategy of Avalanche.

    After every experience the penalty takes up the task's :meth:`information`.

    Args:
        penalty: the penalty.
        update: how the penalty moves the parameters.

    Attributes:
        fisher: the information of the last task, ``None`` before the first.
        growth: how much the parameters have grown in training; it warns of absurd sizes.
        noun: what messages call the information.
        remedy: what helps against divergence besides smaller numbers; with its comma.

    Raises:
        TypeError: the update has another type.
    """

    noun: ClassVar[str] = "information"
    remedy: ClassVar[str] = ""

    def __init__(self, penalty: EWCPenalty, update: Update = InLoss()) -> None:
        super().__init__()
        check_update(update)
        self.update = update
        self.penalty = penalty
        self.fisher: FisherMatrix | None = None
        self.growth = Growth()
        self._finite = FiniteSteps()
        self._checks = PenaltyChecks(
            self.growth, explicit=self._running.explicit, remedy=self.remedy
        )

    @property
    def penalty(self) -> EWCPenalty:
        """The penalty; its ``state_dict()`` holds the information of all tasks."""
        return self._penalty

    @penalty.setter
    def penalty(self, value: EWCPenalty) -> None:
        self._penalty = value
        self._running = self.update.start(value)

    @property
    def last_penalty(self) -> Tensor:
        """The penalty's value in the current iteration, without gradient; 0 in the first task.

        It is an estimate where a step does not use all eigenvectors.  With implicit steps it is
        the value after one of the last ten of them.
        """
        return self._running.last_penalty

    @abstractmethod
    def information(self, strategy: Any, **options: Any) -> FisherMatrix:
        """The information of the task that was just trained; ``options`` are those of loaders."""

    def num_examples(self, strategy: Any) -> int:
        """The weight of the task in training relative to other tasks: its size."""
        return sum(len(experience.dataset) for experience in _experiences(strategy))

    def before_training_exp(self, strategy: Any, **options: Any) -> None:
        """Set the weight of the task in training."""
        self.penalty.num_examples = self.num_examples(strategy)
        self._finite = FiniteSteps(self.penalty if self._running.explicit else None, self.growth)
        self.growth.start(strategy.model)

    def before_backward(self, strategy: Any, **options: Any) -> None:
        """Add the penalty to the loss of the current mini-batch.

        Warns:
            UserWarning: the parameters have grown beyond any use.

        Raises:
            FloatingPointError: the loss is not finite; the message names the task, the step and
                the layer.  On an accelerator it may come later (:mod:`ewc.finite_steps`).
        """
        term = self._running.loss_term(strategy.model)
        if term is not None:
            strategy.loss = strategy.loss + term
        self._finite.check_loss(strategy)

    def before_update(self, strategy: Any, **options: Any) -> None:
        """Note the gradients' norms on an accelerator, and check the learning rate.

        Warns:
            UserWarning: gradient descent on the penalty diverges (:meth:`EWCPenalty.stiffness`).
        """
        self._checks.before_update(self.penalty, strategy)
        self._finite.note_gradients(strategy)

    def after_update(self, strategy: Any, **options: Any) -> None:
        """Let the penalty move the parameters beside the loss."""
        self._running.after_step(strategy.model, strategy.optimizer)

    def after_training_exp(self, strategy: Any, **options: Any) -> None:
        """Add the task's information to the penalty.

        After an error the penalty is unchanged.

        Warns:
            UserWarning: the penalty did not matter in the task, the parameters have grown beyond
                any use, or the information is zero.

        Raises:
            ValueError: a target does not fit the outputs.
            FloatingPointError: a loss, the outputs or the information are not finite; the message
                names the task.
        """
        self._finite.look(strategy)
        self._running.catch_up(strategy.model, strategy.optimizer)
        self._checks.after_task(self.penalty, strategy)
        try:
            fisher = self.information(strategy, **options)
            self.penalty.consolidate(
                fisher, strategy.model, num_examples=self.num_examples(strategy)
            )
        except FloatingPointError as error:
            raise FloatingPointError(
                f"Training diverged in task {task_number(strategy)}, as its {self.noun} shows: "
                f"{error}"
            ) from error
        self.fisher = fisher

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on with training: tensors and plain values."""
        return {"penalty": self.penalty.get_extra_state(), **self._running.state()}

    def restore(self, state: Mapping[str, Any], strategy: Any) -> None:
        """Go on from a :meth:`state`; ``fisher`` stays ``None`` until the end of the task.

        Raises:
            ValueError: it is not the state of a penalty; nothing is restored.
        """
        self.penalty.set_extra_state(state["penalty"])
        self._running.restore(state, strategy.device)


class EWCPlugin(PenaltyPlugin):
    r"""EWC for any supervised strategy of Avalanche.

    After every experience the plugin computes the Fisher information of the task for its
    :class:`~ewc.penalty.EWCPenalty`.  During the next experiences the penalty is a term of
    ``strategy.loss``::

        strategy = Naive(model=model, optimizer=optimizer, plugins=[EWCPlugin(strength=1.0)])

    The information is that of the function that the strategy trains.  This is what its
    ``_unpack_minibatch()`` and ``forward()`` make of a mini-batch, with the network in evaluation
    mode.  The data come from the strategy's ``eval_dataset_adaptation()`` and
    ``make_eval_dataloader()``: evaluation transforms, batch size, collate function, and the loader
    options given to ``train()``.  For ``JointTraining`` they are the data of all experiences in
    training.  Examples of earlier tasks (replay, ``Cumulative``) do not count, as the penalty has
    these tasks already.

    Avalanche's plugin squares the mean gradient of a mini-batch.  Here the information is that of
    single examples: it does not depend on the batch size, and ``strength=1`` is the Bayes value.

    Args:
        strength: :math:`\lambda`.
        likelihood: what the model's outputs mean; it should match the criterion.
        estimator: how the expectation over targets is taken.
        structure: what of the Fisher matrix is kept.
        consolidation: how the quadratics of several tasks are combined.
        shrinkage: the fraction of the information that is spread over a layer's units
            (:meth:`ewc.FisherMatrix.shrunk`); 0 leaves the Fisher matrix as it is.
        update: how the penalty moves the parameters, :class:`~ewc.consolidation.update.InLoss` or
            :class:`~ewc.consolidation.update.ImplicitSteps`.
        max_examples: the largest number of examples per Fisher matrix.  A larger task is sampled
            at random, and keeps its weight in the penalty.  ``None`` for all examples.
        seed: the seed of the samples; the global random number generators do not change.

    Attributes:
        fisher: the mean Fisher information of the last task, ``None`` before the first; its
            ``num_examples`` is the size of the sample.

    Raises:
        ValueError: the strength is negative or not finite, ``shrinkage`` is not in [0, 1] or the
            structure cannot be shrunk, ``max_examples`` is not a whole number above 0, the seed is
            not whole, or the estimator has a loss in place of the likelihood.
        TypeError: the likelihood, the estimator, the structure, the consolidation or the update
            has another type.
    """

    noun = "Fisher information"
    remedy = (
        ", or implicit steps (update=ImplicitSteps() in Python, "
        "strategy/update=implicit on the command line)"
    )

    def __init__(
        self,
        strength: float = 1.0,
        *,
        likelihood: Likelihood = Categorical(),
        estimator: Estimator = Exact(),
        structure: Structure[Any] = Diagonal(),
        consolidation: Consolidation = Separate(),
        shrinkage: float = 0.0,
        update: Update = InLoss(),
        max_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        check_likelihood(likelihood)
        check_estimator(estimator)
        check_no_loss(estimator, "EWCPlugin")
        check_structure(structure)
        check_count(max_examples, "max_examples", optional=True)
        check_whole(seed, "seed")
        if shrinkage and not structure.has_units:
            raise ValueError(
                f"shrinkage must be 0 with {structure}, got {shrinkage}: only diagonal, Kronecker "
                "and eigenvalue-corrected Fisher matrices can be shrunk."
            )
        super().__init__(EWCPenalty(strength, consolidation, shrinkage=shrinkage), update)
        self.likelihood = likelihood
        self.estimator = estimator
        self.structure = structure
        self.max_examples = max_examples
        self.seed = seed

    def information(self, strategy: Any, **options: Any) -> FisherMatrix:
        """The Fisher information of the task, from a sample of a large one."""
        return self._information(strategy, self._sample(strategy), options)

    def before_training_exp(self, strategy: Any, **options: Any) -> None:
        """Set the weight of the next task in the penalty, and try the first task.

        Raises:
            ValueError: as in :meth:`check_task`.
        """
        super().before_training_exp(strategy, **options)
        if not self.penalty.terms:
            self.check_task(strategy, **options)

    def check_task(self, strategy: Any, **options: Any) -> None:
        """Check before training that the Fisher information of a task can be computed.

        Raises:
            ValueError: the targets, the outputs, the mini-batches or the structure do not fit; the
                message says why.
            FloatingPointError: the outputs or the information of these examples are not finite.
        """
        dataset = _dataset(strategy)
        places = list(range(0, len(dataset), max(1, len(dataset) // EXAMPLES_TRIED)))
        # A few examples need no worker processes.
        options["num_workers"] = 0
        try:
            self._information(strategy, dataset.subset(places), options, most=len(places))
        except (ValueError, FloatingPointError) as error:
            kind = ValueError if isinstance(error, ValueError) else FloatingPointError
            raise kind(
                f"The Fisher information of task {task_number(strategy)} cannot be computed, as a "
                f"try with {len(places)} of its examples shows: {error}"
            ) from error

    def _sample(self, strategy: Any) -> Any:
        """The data for the Fisher information, a sample of a large task."""
        dataset = _dataset(strategy)
        if self.max_examples is None or len(dataset) <= self.max_examples:
            return dataset
        generator = torch.Generator().manual_seed(self.seed + task_number(strategy))
        places = torch.randperm(len(dataset), generator=generator)[: self.max_examples]
        return dataset.subset(places.sort().values.tolist())

    def _information(
        self, strategy: Any, dataset: Any, options: dict[str, Any], most: int | None = None
    ) -> FisherMatrix:
        """The Fisher information over the first ``most`` examples of a data set, or over all.

        The strategy, its network and the random number generators do not change.
        """
        with unwrapped(strategy.model) as model, undisturbed(model), _kept_random_states():
            first = next(iter(_loader(strategy, dataset.subset([0]), {})))
            calls = strategy_calls(strategy, model, first)
            if self.max_examples is not None and len(calls(first)[1]) != 1:
                raise ValueError(
                    f"max_examples must be None with {type(strategy).__name__}, got "
                    f"{self.max_examples}: its make_eval_dataloader() does not load the strategy's "
                    "adapted_dataset."
                )
            fisher: FisherMatrix = fisher_information(
                calls.network,
                Batches(_loader(strategy, dataset, options), calls, most),
                self.likelihood,
                estimator=self.estimator,
                structure=self.structure,
            )
            return fisher


def _experiences(strategy: Any) -> list[Any]:
    """The experiences in training, of which ``JointTraining.experience`` is the first only."""
    return strategy._experiences if isinstance(strategy, JointTraining) else [strategy.experience]


def _dataset(strategy: Any) -> Any:
    """The data of the task in training, adapted by the strategy for evaluation."""
    evaluation = beside(strategy, strategy.model)
    datasets = []
    for experience in _experiences(strategy):
        evaluation.experience = experience
        evaluation.eval_dataset_adaptation()
        datasets.append(evaluation.adapted_dataset)
    return datasets[0] if len(datasets) == 1 else concat_datasets(datasets)


def _loader(strategy: Any, dataset: Any, options: dict[str, Any]) -> Any:
    """The strategy's evaluation loader, with the loader options given to ``train()``.

    The strategy makes it, so that its batch size, its collate function and what a subclass does to
    load data stay.  Every example comes once, in the order of the data.
    """
    evaluation = beside(strategy, strategy.model)
    evaluation.adapted_dataset = dataset
    order = ("shuffle", "drop_last")
    evaluation.make_eval_dataloader(**{k: v for k, v in options.items() if k not in order})
    return evaluation.dataloader


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Keep the states of Python's and NumPy's generators, from which data sets draw."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _name_optimizer_modules() -> None:
    """Make the optimizer classes importable for Avalanche's ``save_checkpoint``.

    ``torch.optim`` deletes the names of its submodules.  Without them dill cannot import
    ``torch.optim.SGD``, stores the class by value and fails (avalanche-lib 0.6.0 with torch 2.15).
    """
    for name, module in list(sys.modules.items()):
        package, _, leaf = name.rpartition(".")
        if package == "torch.optim" and not hasattr(torch.optim, leaf):
            setattr(torch.optim, leaf, module)


_name_optimizer_modules()
