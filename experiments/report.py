"""A sweep's report, written again: ``python -m experiments.report SWEEP_DIR``."""

import sys
from pathlib import Path

from experiments.reporting.sweep import report_sweep


def main() -> None:
    """Write a sweep's report again."""
    if len(sys.argv) != 2 or not report_sweep(Path(sys.argv[1])):
        sys.exit("usage: python -m experiments.report SWEEP_DIR (a folder of jobs with results)")


if __name__ == "__main__":
    main()
