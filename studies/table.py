"""What a row found, as a table on the terminal."""

from rich.table import Table

from studies.verification import TOPICS, Outcome

VERDICTS = {True: "yes", False: "[bold red]no[/]", None: "-"}
"""Whether a figure meets its bar, ``None`` where there is none."""


def table_of(outcome: Outcome) -> Table:
    """The figures of one row, their bars, and whether they meet them."""
    title = f"{outcome.topic}: {TOPICS[outcome.topic]} ({outcome.seconds:.0f} s)"
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("what", ratio=1)
    for heading in ("measured", "bar", "holds"):
        table.add_column(heading, no_wrap=True, justify="right")
    if outcome.missing is not None:
        table.add_row(outcome.missing, "", "", "not run")
    for check in outcome.checks:
        table.add_row(check.claim, f"{check.measured:.4g}", check.bar, VERDICTS[check.holds])
    return table
