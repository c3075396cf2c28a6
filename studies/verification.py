"""The rows of the table, each run by itself, and what they found."""

import importlib
import json
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from ewc.checks import check_count
from experiments.data import default_data_root
from experiments.mnist_files import DamagedFileError
from studies.check import Check, Surroundings

TOPICS = {
    "parametric": "Fisher information of a parametric model",
    "formulations": "Two formulations, and the gap between them",
    "curvature": "Expected curvature of the log-likelihood",
    "cramer_rao": "Cramer-Rao bound",
    "asymptotics": "Standard errors, intervals and tests",
    "kfac": "K-FAC: Kronecker structure, as optimizer and as posterior",
    "empirical": "Empirical Fisher",
    "natural_gradient": "Natural gradient descent",
    "geometry": "Information geometry",
    "influence": "Influence of training examples",
    "model_selection": "Model selection",
    "spectrum": "Overparametrised models",
    "forgetting": "Forgetting, predicted",
}
"""The rows by the module of :mod:`studies` that measures them."""


@dataclass(frozen=True)
class Outcome:
    """What one row measured.

    Attributes:
        topic: the row.
        checks: its figures.
        seconds: how long it took.
        missing: why it could not run; ``None`` if it did.
    """

    topic: str
    checks: list[Check]
    seconds: float
    missing: str | None = None

    @property
    def holds(self) -> bool:
        """Whether it ran and every figure meets its bar."""
        return self.missing is None and all(check.holds is not False for check in self.checks)


@dataclass(frozen=True)
class Verification:
    """Rows of the table of what the Fisher information is for.

    Attributes:
        row: a topic, or ``all``.
        data_root: where MNIST is; ``None`` for the environment's ``EWC_DATA``, else a folder
            in the user's cache.
        pictures: the folder for pictures; ``None`` for the run's own.
        seed: decides whatever is drawn at random.
        processes: rows that run at a time, with one thread each.

    Raises:
        ValueError: there is no such row, or no process.
    """

    row: str = "all"
    data_root: str | None = None
    pictures: str | None = None
    seed: int = 0
    processes: int = 2

    def __post_init__(self) -> None:
        """Check the row."""
        if self.row != "all" and self.row not in TOPICS:
            raise ValueError(f"row is {self.row!r}: it must be all, or one of {', '.join(TOPICS)}.")
        check_count(self.processes, "processes")

    def outcomes(self, directory: Path) -> Iterator[Outcome]:
        """The rows as they are done, and ``verify.json`` in the end."""
        pictures = Path(self.pictures) if self.pictures else directory
        pictures.mkdir(parents=True, exist_ok=True)
        root = Path(self.data_root) if self.data_root else default_data_root()
        surroundings = Surroundings(root, pictures, self.seed)
        topics = list(TOPICS) if self.row == "all" else [self.row]
        found: dict[str, Outcome] = {}
        # Processes of their own: what a row does to threads or seeds is no other row's matter.
        workers = min(self.processes, len(topics))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = [pool.submit(outcome_of, topic, surroundings) for topic in topics]
            for future in as_completed(running):
                outcome = future.result()
                found[outcome.topic] = outcome
                yield outcome
        record = [asdict(found[topic]) for topic in topics]
        text = json.dumps(record, indent=1)
        (directory / "verify.json").write_text(text + "\n", encoding="utf-8")


def outcome_of(topic: str, surroundings: Surroundings) -> Outcome:
    """Measure one row, with one thread and denormal numbers flushed to zero."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(surroundings.seed)
    # What torch 2.15 says of itself when forward derivatives are first taken.
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
    module = importlib.import_module(f"studies.{topic}.study")
    start = time.perf_counter()
    try:
        checks = module.verify(surroundings)
    except (FileNotFoundError, DamagedFileError) as error:
        return Outcome(topic, [], time.perf_counter() - start, str(error))
    except ModuleNotFoundError as error:
        # Of the packages for development, with which some rows compare.
        missing = f"{error.name} is not installed: pip install -e '.[dev]' does it."
        return Outcome(topic, [], time.perf_counter() - start, missing)
    return Outcome(topic, checks, time.perf_counter() - start)
