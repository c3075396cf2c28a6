"""The accuracy matrix as a page by itself, which shows a number where the pointer is."""

from collections.abc import Sequence
from html import escape

CELL = 44
"""The side of a cell in pixels."""

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 8px; background: #fff; color: #222; }
text { font-size: 12px; text-anchor: middle; dominant-baseline: central; fill: currentColor; }
text, title { pointer-events: none; }
rect:hover { stroke: #d33; stroke-width: 3; }
@media (prefers-color-scheme: dark) { body { background: #1a1a1a; color: #ddd; } }
"""


def heat_map(matrix: Sequence[Sequence[float]], title: str) -> str:
    """A page in HTML that needs nothing else.

    Args:
        matrix: the accuracies from 0 to 1; row ``i`` after task ``i``, column ``j`` on task ``j``.
        title: the title.
    """
    size = len(matrix)
    edge = CELL * (size + 1)
    parts = []
    for place in range(size):
        along = CELL * place + CELL * 3 // 2
        parts += [f'<text x="{along}" y="{CELL // 2}">{place + 1}</text>']
        parts += [f'<text x="{CELL // 2}" y="{along}">{place + 1}</text>']
    for i, row in enumerate(matrix):
        for j, accuracy in enumerate(row):
            x, y, percent = CELL * (j + 1), CELL * (i + 1), 100 * accuracy
            when = "" if j <= i else ", not yet trained"
            # Tasks that come later are faint.
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="hsl(210 80% {95 - 0.6 * percent:.0f}%)" opacity="{1 if j <= i else 0.35}">'
                f"<title>after task {i + 1}, on task {j + 1}: {percent:.2f} %{when}</title></rect>"
                f'<text x="{x + CELL // 2}" y="{y + CELL // 2}" '
                f'style="fill: {"#fff" if percent > 60 and j <= i else "#222"}">'
                f"{percent:.0f}</text>"
            )
    return (
        f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style>'
        f"<p>{escape(title)}: test accuracy in %. Row: after this task. Column: on this task.</p>"
        f'<svg viewBox="0 0 {edge} {edge}" style="max-width: {edge}px">{"".join(parts)}</svg>\n'
    )
