"""A picture as SVG inside a page: its colours are the page's, and it answers the pointer."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#5b626b", "#d9dce0"

SERIES = (
    "#2463c2", "#c8560a", "#0f7f6b", "#a8327a", "#7d6300",
    "#6a46bd", "#b3372b", "#2c7d97", "#4d7a1e", "#8a4b2f",
)  # fmt: skip
"""The colours of curves on a white page; the page has lighter ones for a dark screen."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
    colour: f"--series-{place}" for place, colour in enumerate(SERIES)
}


@dataclass
class Picture:
    """A figure, and what the page says of it.

    Attributes:
        name: the name of its file, without suffix.
        title: its title on the page.
        text: a sentence on what it shows.
        figure: the figure, in the colours of a white page.
        hovers: what the pointer shows, by the id of the artist.
    """

    name: str
    title: str
    text: str
    figure: Figure
    hovers: dict[str, str] = field(default_factory=dict)

    def hover(self, artist: Artist, text: str) -> None:
        """Show a text while the pointer is on an artist."""
        name = f"hover{len(self.hovers)}"
        artist.set_gid(name)
        self.hovers[name] = text

    def svg(self) -> str:
        """The picture as an element of a page, with ids that no other picture has."""
        text = self._saved(format="svg", transparent=True).decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        # The page sets the width.
        text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
        text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
        text = re.sub(r"^<svg", f'<svg role="img" aria-label="{html.escape(self.title)}"', text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        for name, shown in self.hovers.items():
            title = f"<title>{html.escape(shown)}</title>"
            text = text.replace(f'<g id="{name}">', f'<g id="{name}">{title}', 1)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        return re.sub(r'(href="|url\()#', rf"\1#{self.name}-", text)

    def png(self) -> bytes:
        """The picture as a PNG file on white."""
        return self._saved(format="png", dpi=160, facecolor="white")

    def _saved(self, **options: Any) -> bytes:
        written = io.BytesIO()
        self.figure.savefig(written, **options)
        # The layout is found once, as it takes longer than the drawing.
        self.figure.set_layout_engine("none")
        return written.getvalue()


@contextmanager
def drawn_for_a_page() -> Iterator[None]:
    """Draw in the colours and the letters of the page."""
    options: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ewc",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.linewidth": 1.6,
    }
    with mpl.rc_context(options):
        yield
