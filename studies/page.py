"""The table of a study in its page, written from the run."""

import re
from pathlib import Path

import torch

from experiments.recording.files import write_whole
from studies.findings import Claim, Findings, Setting
from studies.topics import STUDIES

PAGE, PICTURE = "README.md", "picture.png"
"""Files in the folder of every topic."""

REGION = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end -->)", re.DOTALL)
"""What a run rewrites in a page."""

VERDICTS = {True: "yes", False: "**no**", None: ""}
"""Whether a claim holds, as the page says it."""


def write_page(topic: str, findings: Findings, setting: Setting, output: Path) -> None:
    """Write the page with the new table, and the picture, to the topic's folder in ``output``."""
    text = (STUDIES / topic / PAGE).read_text(encoding="utf-8")
    folder = output / topic
    folder.mkdir(parents=True, exist_ok=True)
    findings.picture.savefig(folder / PICTURE, dpi=120)
    write_whole(folder / PAGE, with_table(text, findings.claims, setting))


def with_table(text: str, claims: list[Claim], setting: Setting) -> str:
    """The text of a page with the claims in its marked region.

    Raises:
        ValueError: the page does not have exactly one marked region.
    """
    table = "\n".join([
        "",
        "| what | measured | required | holds |",
        "|---|---|---|---|",
        *(
            f"| {claim.quantity} | {claim.measured:.3g} | {claim.required} "
            f"| {VERDICTS[claim.holds]} |"
            for claim in claims
        ),
        "",
        f"Seed {setting.seed}, torch {torch.__version__.split('+')[0]}.",
        "",
        "",
    ])  # fmt: skip
    # A function, as a quantity may hold a backslash.
    changed, count = REGION.subn(lambda _: table, text)
    if count != 1:
        raise ValueError(
            "A page must have one region from <!-- table --> to <!-- end -->, each on its own "
            f"line, but it has {count}."
        )
    return changed
