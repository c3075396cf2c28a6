"""The outcome of a study, as a table on the terminal."""

from rich.table import Table

from studies.outcomes import Outcome
from studies.topics import TOPICS

VERDICTS = {True: "yes", False: "[bold red]no[/]", None: "-"}
"""Whether a claim holds; ``None`` if every number is allowed."""


def table_of(outcome: Outcome) -> Table:
    """The claims of a study, what they require, and whether they hold."""
    title = f"{outcome.topic}: {TOPICS[outcome.topic]} ({outcome.seconds:.0f} s)"
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("what", ratio=1)
    for heading in ("measured", "required", "holds"):
        table.add_column(heading, no_wrap=True, justify="right")
    if outcome.missing is not None:
        table.add_row(outcome.missing, "", "", "not run")
    for claim in outcome.claims:
        table.add_row(
            claim.quantity, f"{claim.measured:.4g}", claim.required, VERDICTS[claim.holds]
        )
    return table
