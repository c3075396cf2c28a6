"""Where a run's numbers go: ``metrics.jsonl`` and Weights & Biases, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import wandb

from experiments.schema import ConfigurationError


@dataclass(frozen=True)
class WandB:
    """How a run shows in Weights & Biases.

    Attributes:
        mode: ``offline`` keeps the run on disk, ``online`` sends it, ``disabled`` drops it.
        project: the project.
        entity: the user or team; ``None`` for the default one.
        name: the run's name; ``None`` for one made from benchmark, strategy and seed.
        group: the runs it belongs with; ``None`` for the sweep's folder, if any.
        tags: words to find it by.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "ewc"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


class Recorder:
    """Writes every record of a run to ``metrics.jsonl`` and to W&B (a context manager).

    Args:
        directory: the run's directory.
        options: how the run shows in W&B.
        config: the resolved configuration, kept with the run.
        name: the run's name, where ``options`` has none.
        group: its group, where ``options`` has none.
    """

    def __init__(
        self,
        directory: Path,
        options: WandB,
        config: Mapping[str, Any],
        name: str,
        group: str | None,
    ) -> None:
        self.directory = directory
        self.options = options
        self._file = (directory / "metrics.jsonl").open(
            "w", encoding="utf-8", buffering=1
        )  # line by line: a run that is cut short keeps its records
        try:
            self.run = wandb.init(
                mode=options.mode,
                project=options.project,
                entity=options.entity,
                name=options.name or name,
                group=options.group or group,
                tags=options.tags,
                job_type="train",
                dir=directory,
                config=dict(config),
                reinit="finish_previous",
                settings=wandb.Settings(
                    silent=True, console="off", x_disable_stats=True, save_code=False
                ),
            )
        except wandb.errors.UsageError as error:
            self._file.close()
            raise ConfigurationError(
                f"wandb.mode is 'online' and W&B says: {error} wandb.mode=offline and "
                "wandb.mode=disabled need no account."
            ) from error
        except wandb.errors.CommError as error:
            self._file.close()
            raise ConfigurationError(
                "wandb.mode is 'online' and W&B cannot be reached: wandb.mode=offline keeps "
                "the run on disk for a later `wandb sync`."
            ) from error
        # W&B drops what is logged under a smaller step than before; each kind of record
        # has its own axis instead.
        self.run.define_metric("step")
        self.run.define_metric("task")
        self.run.define_metric("train/*", step_metric="step")
        for kind in ("eval", "fisher", "drift"):
            self.run.define_metric(f"{kind}/*", step_metric="task")

    def __enter__(self) -> Self:
        """Nothing more to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close both, the W&B run as failed if there was an error."""
        self._file.close()
        self.run.finish(exit_code=0 if error is None else 1)

    def log(self, record: Mapping[str, float | int]) -> None:
        """Write one record of scalars; it names its axis, ``step`` or ``task``."""
        self._file.write(json.dumps(record) + "\n")
        self.run.log(dict(record))

    def picture(self, name: str, path: Path) -> None:
        """Show a PNG file in the W&B run."""
        self.run.log({name: wandb.Image(str(path))})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the W&B run."""
        self.run.log({name: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})

    def summary(self, values: Mapping[str, float]) -> None:
        """Set the final figures of the W&B run."""
        self.run.summary.update(dict(values))

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the run later; ``None`` if there is nothing to upload."""
        if self.options.mode != "offline":
            return None
        folder = Path(self.run.dir).parent
        here = Path.cwd()
        return f"wandb sync {folder.relative_to(here) if folder.is_relative_to(here) else folder}"
