"""The command line: ``python -m studies [row=<topic>|all] [option=value ...]``."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.command_line import CONFIGS, ended_briefly, remove_traces
from experiments.schema import ConfigurationError, build, plain


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="verify")
def run(config: DictConfig) -> None:
    """Measure the rows; ends with status 1 where a figure misses its bar."""
    from studies.verification import Verification

    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        verification = build(plain(config), Verification)
    except ConfigurationError as error:
        remove_traces(directory)
        sys.exit(f"error: {error}")
    # Slow to import, and not needed to find a wrong option on the command line.
    from rich.console import Console

    from studies.table import table_of

    outcomes = []
    for outcome in verification.outcomes(directory):
        outcomes.append(outcome)
        Console().print(table_of(outcome))
    failed = [outcome.topic for outcome in outcomes if not outcome.holds]
    verdicts = [check.holds for outcome in outcomes for check in outcome.checks]
    held, missed, shown = (verdicts.count(verdict) for verdict in (True, False, None))
    print(
        f"{held} of {held + missed} figures meet their bars, {shown} have none, in "
        f"{sum(outcome.seconds for outcome in outcomes):.0f} s of {len(outcomes)} rows; "
        f"figures and pictures: {os.path.relpath(directory)}"
    )
    if failed:
        sys.exit(f"not all holds in: {', '.join(failed)}")


if __name__ == "__main__":
    ended_briefly(run, "verify")
