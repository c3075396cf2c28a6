"""The command line: ``python -m studies [TOPIC ...|all]``."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from studies.topics import STUDIES, TOPICS

EVERY = "all"


class BriefParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: {message}\n")


def count(text: str) -> int:
    """A number of at least 1, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}.")
    return int(text)


def listing() -> str:
    """The topics, one a line, with their questions."""
    width = max(map(len, TOPICS))
    return "\n".join(f"  {topic:<{width}}  {question}" for topic, question in TOPICS.items())


def parser() -> BriefParser:
    """The options."""
    options = BriefParser(
        prog="python -m studies",
        description="Measure what theory says about the Fisher information.",
        epilog=f"topics:\n{listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "topics", metavar="TOPIC", nargs="*", help=f"a topic of the list below, or {EVERY}"
    )
    options.add_argument(
        "--data-root",
        metavar="DIR",
        type=Path,
        help="folder of MNIST (default: EWC_DATA, else a folder in the user's cache)",
    )
    options.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=STUDIES,
        help="folder for pages and pictures (default: those in the source are rewritten)",
    )
    options.add_argument("--seed", type=int, default=0, help="of all random draws (default: 0)")
    options.add_argument(
        "--processes",
        metavar="N",
        type=count,
        default=2,
        help="studies that run at a time, one thread each (default: 2)",
    )
    return options


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options on the command line; ends with status 2 if one is wrong."""
    options = parser()
    chosen, unknown = options.parse_known_args(arguments)
    if unknown:
        allowed = "--data-root, --output, --seed and --processes"
        options.error(f"unknown option {unknown[0]!r}: allowed are {allowed}.")
    for topic in chosen.topics:
        if topic not in TOPICS and topic != EVERY:
            options.error(
                f"unknown topic {topic!r}: allowed are {EVERY} and {', '.join(sorted(TOPICS))}."
            )
    return chosen


def main(arguments: list[str]) -> int:
    """Run the studies; the status is 1 if a claim fails or a study could not run."""
    options = parsed(arguments)
    if not options.topics:
        print(f"Choose topics, or {EVERY}: python -m studies TOPIC ...\n\n{listing()}")
        return 0
    # Slow to import, and not needed for the help.
    from rich.console import Console

    from experiments.tasks.images import default_data_root
    from studies.findings import Setting
    from studies.outcomes import outcomes
    from studies.table import table_of

    topics = [topic for topic in TOPICS if topic in options.topics or EVERY in options.topics]
    setting = Setting(options.data_root or default_data_root(), options.seed)
    finished = []
    for outcome in outcomes(topics, setting, options.output, options.processes):
        finished.append(outcome)
        Console().print(table_of(outcome))
    verdicts = [claim.holds for outcome in finished for claim in outcome.claims]
    held, failed, shown = (verdicts.count(verdict) for verdict in (True, False, None))
    print(
        f"{held} of {held + failed} claims hold; {shown} figures have no requirement. "
        f"Pages and pictures: {os.path.relpath(options.output)}."
    )
    if failing := [outcome.topic for outcome in finished if not outcome.holds]:
        print(f"Claims fail, or the study could not run: {', '.join(failing)}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
