"""One run in Weights & Biases, whose errors never end the run itself."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import wandb

from experiments.configuration.command_line import sentence
from experiments.configuration.targets import ConfigurationError
from experiments.recording.files import only_warned
from experiments.recording.label import Label

_log = logging.getLogger(__name__)

_OTHER_MODES = {
    "online": "wandb.mode=offline keeps the run on disk for a later `wandb sync`",
    "offline": "wandb.mode=disabled does without W&B",
    "disabled": "W&B is not installed as it should be",
}

PATIENCE = 30.0
"""Seconds that a run waits for W&B's server, when it begins and again when it ends."""

ARTIFACT_BYTES = 100 * 2**20
"""The size of all artifacts of a run alone, where nothing else is asked for."""

SLOW = 5.0
"""Seconds for one artifact after which a run hands over no more: W&B asks its server for each."""

AXES = {
    "step": ["train/*"],
    "task": ["eval/*", "fisher/*", "drift"],
}
"""The axis of every metric.

W&B drops what is logged under a smaller step than before, so each kind of record has its own.
"""


@dataclass(frozen=True)
class WandB:
    """How a run appears in Weights & Biases.

    Attributes:
        mode: ``offline`` keeps the run on disk, ``online`` uploads it, ``disabled`` drops it.
        project: the project.
        entity: the user or team; ``None`` for the default one.
        name: the run's name; ``None`` for one made from the options.
        group: the name of a group of runs; ``None`` for the sweep, if any.
        tags: tags of the run, besides those made from the options.
        artifacts: whether network, Fisher matrix and penalty are kept after every task.  ``auto``
            is up to 100 MiB in a run alone, and none in a job of a sweep: fifty jobs would fill
            the disk, and their checkpoints have the last state.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "ewc"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: Literal["auto", "always", "never"] = "auto"

    def bytes_for_artifacts(self, label: Label) -> float:
        """How much the artifacts of a run may take on disk."""
        if self.mode == "disabled" or self.artifacts == "never":
            return 0
        if self.artifacts == "always":
            return float("inf")
        return 0 if label.job_type == "sweep" else ARTIFACT_BYTES


class WandBRun:
    """A run in W&B; once it has begun, an error of W&B becomes a warning.

    Args:
        directory: the run's directory; W&B writes into its folder ``wandb`` and nowhere else.
        options: how the run appears.
        config: the resolved configuration, kept as ``options`` of the run's configuration.
        label: what the run is called, where ``options`` says nothing.
        run: the identity of the run that is continued; ``None`` for a new one.

    Attributes:
        id: the identity of the run.

    Raises:
        ConfigurationError: W&B cannot start.
    """

    def __init__(
        self,
        directory: Path,
        options: WandB,
        config: Mapping[str, Any],
        label: Label,
        run: str | None,
    ) -> None:
        self.options = options
        self._folder = directory / "wandb"
        self._shows = True
        self._is_uploaded = options.mode == "online"
        self._left = options.bytes_for_artifacts(label)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_kept_in(self._folder))
            begin = partial(
                wandb.init,
                project=options.project,
                entity=options.entity,
                name=options.name or label.name,
                group=options.group or label.group,
                tags=list(dict.fromkeys([*label.tags, *options.tags])),
                job_type=label.job_type,
                notes=label.notes,
                id=run,
                resume=None if run is None else "allow",
                dir=directory,
                config={**label.choices, "options": dict(config)},
                reinit="finish_previous",
                settings=wandb.Settings(
                    silent=True,
                    console="wrap",  # "redirect" would replace the process's own files
                    save_code=False,
                    init_timeout=PATIENCE,
                    finish_timeout=PATIENCE,
                    finish_timeout_raises=True,
                ),
            )
            try:
                self.run = self._begun(begin)
            except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
                raise ConfigurationError(
                    f"wandb.mode is {options.mode!r} and W&B says: {sentence(error)} "
                    "wandb.mode=offline and wandb.mode=disabled need no account."
                ) from error
            except (wandb.errors.Error, OSError) as error:
                raise ConfigurationError(
                    f"wandb.mode is {options.mode!r} and W&B cannot begin ({sentence(error)}): "
                    f"{_OTHER_MODES[options.mode]}."
                ) from error
            for axis, names in AXES.items():
                self.run.define_metric(axis)
                for name in names:
                    self.run.define_metric(name, step_metric=axis)
            self.id = self.run.id  # W&B's process may end before this one
            self._closing = stack.pop_all()

    def _begun(self, begin: Callable[..., wandb.Run]) -> wandb.Run:
        """The W&B run; it is kept on disk where the server cannot be reached."""
        try:
            return begin(mode=self.options.mode)
        except wandb.errors.AuthenticationError:
            raise
        except wandb.errors.CommError as error:
            if self.options.mode != "online":
                raise
            _log.warning("W&B does not take the run (%s): it is kept on disk.", sentence(error))
            self._is_uploaded = False
            return begin(mode="offline")

    def finish(self, error: BaseException | None) -> None:
        """End the run; it counts as failed after an error, and as diverged where it has."""
        ended = False
        with self._guarded("the end of the W&B run"):
            if isinstance(error, FloatingPointError):
                self.run.tags = (*(self.run.tags or ()), "diverged")
                self.run.summary["diverged"] = str(error)
            code = error.code if isinstance(error, SystemExit) else 1
            self.run.finish(exit_code=0 if error is None else code if isinstance(code, int) else 1)
            ended = True
        if not ended:
            # W&B's process may be lost: the next run of a sweep gets another one.
            with contextlib.suppress(Exception):
                wandb.teardown()
        self._closing.close()

    def log(self, record: Mapping[str, Any], hidden: Iterable[str] = ()) -> None:
        """Show one record of scalars, some without a panel, unless an earlier one failed."""
        if self._shows:
            self._shows = False
            with self._guarded("records in W&B"):
                for name in hidden:
                    self.run.define_metric(name, hidden=True)
                self.run.log(dict(record))
                self._shows = True

    def picture(self, name: str, path: Path) -> None:
        """Show a PNG file."""
        with self._guarded(f"{name} in W&B"):
            self.run.log({name: wandb.Image(str(path))})

    def page(self, name: str, html: str) -> None:
        """Show a piece of HTML."""
        with self._guarded(f"{name} in W&B"):
            self.run.log({name: wandb.Html(html, inject=False, data_is_not_path=True)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table."""
        with self._guarded(f"{name} in W&B"):
            table = wandb.Table(columns=list(columns), data=[list(r) for r in rows])
            self.run.log({name: table})

    def artifact(self, kind: str, task: int, write: Callable[[Path], object]) -> None:
        """Keep a file with the run, unless there is no room for it."""
        if self._left <= 0:
            return
        alias = f"task{task:02d}"
        path = self._folder / "artifacts" / f"{kind}-{alias}.safetensors"
        with self._guarded(f"{kind} in W&B"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            self._left -= path.stat().st_size
            if self._left < 0:
                path.unlink()
                _log.info(
                    "W&B keeps no more artifacts, as they take over %d MiB: wandb.artifacts=always "
                    "keeps all.",
                    ARTIFACT_BYTES // 2**20,
                )
                return
            artifact = wandb.Artifact(f"{kind}-{self.id}", type=kind, metadata={"task": task})
            # In place: a copy would double the disk space.
            artifact.add_file(
                str(path), name=f"{kind}.safetensors", policy="immutable", skip_cache=True
            )
            started = time.monotonic()
            self.run.log_artifact(artifact, aliases=[alias, "latest"])
            if time.monotonic() - started > SLOW:
                self._left = 0
                _log.warning("W&B is slow to take artifacts: it gets no more of this run.")

    def summary(self, values: Mapping[str, float]) -> None:
        """Set the final figures."""
        with self._guarded("the summary in W&B"):
            self.run.summary.update(dict(values))

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn an error of W&B into a warning; the run then is not uploaded completely."""
        uploaded, self._is_uploaded = self._is_uploaded, False
        with only_warned(what):
            yield
            self._is_uploaded = uploaded

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the run later; ``None`` if there is nothing to upload."""
        if self.options.mode == "disabled" or self._is_uploaded:
            return None
        here, this = Path.cwd(), Path(self.run.dir).parent
        # A run that went on after an interruption has a folder for each of its processes.
        folders = sorted({this, *this.parent.glob(f"*run-*-{self.id}")})
        names = (str(f.relative_to(here) if f.is_relative_to(here) else f) for f in folders)
        return f"wandb sync {' '.join(names)}"


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Make W&B put its files into a folder, not into the home directory.

    Files that wait for their upload then move with the run's folder to another machine, and no
    home directory is needed.
    """
    places = {"WANDB_DATA_DIR": folder, "WANDB_CACHE_DIR": folder / "cache"}
    added = [name for name in places if name not in os.environ]  # the others are the user's choice
    os.environ.update({name: str(places[name]) for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
