"""Studies in separate processes, and their outcomes."""

import importlib
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from experiments.tasks.mnist_files import DamagedFileError
from studies.findings import Claim, Findings, Setting
from studies.page import write_page


@dataclass(frozen=True)
class Outcome:
    """What became of a study.

    Attributes:
        topic: the name of the study.
        claims: what it measured.
        seconds: how long it took.
        missing: why it could not run; ``None`` if it did.
    """

    topic: str
    claims: list[Claim]
    seconds: float
    missing: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the study ran and no claim fails."""
        return self.missing is None and all(claim.holds is not False for claim in self.claims)


def outcomes(
    topics: Sequence[str], setting: Setting, output: Path, processes: int
) -> Iterator[Outcome]:
    """The outcomes of studies, in the order in which they end; writes their pages.

    Args:
        topics: the studies.
        setting: what each is given.
        output: the folder for the topics' pages and pictures.
        processes: how many studies run at a time.
    """
    # A process for each, as a study may change the number of threads or the random state.
    with ProcessPoolExecutor(
        min(processes, len(topics)), mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = [pool.submit(outcome_of, topic, setting, output) for topic in topics]
        for future in as_completed(running):
            yield future.result()


def outcome_of(topic: str, setting: Setting, output: Path) -> Outcome:
    """Run a study on one thread, with denormal numbers flushed to zero, and write its page."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(setting.seed)
    # torch 2.15 warns about itself when forward derivatives are first taken.
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
    study = importlib.import_module(f"studies.{topic}.study")
    start = time.perf_counter()
    try:
        findings: Findings = study.measure(setting)
    except (FileNotFoundError, DamagedFileError) as error:
        return Outcome(topic, [], time.perf_counter() - start, str(error))
    except ModuleNotFoundError as error:
        # Some studies compare with packages of the extra for development.
        missing = f"{error.name} is not installed: pip install -e '.[dev]' installs it."
        return Outcome(topic, [], time.perf_counter() - start, missing)
    seconds = time.perf_counter() - start
    write_page(topic, findings, setting, output)
    return Outcome(topic, findings.claims, seconds)
