"""The pieces of a self-contained HTML page: its frame, tables, plots, legends, and numbers for reading.

    page = render_page(title="x", kind="report", summary=[...], main=[table(head, rows), plot(...)], footer="...")

A page holds all that it needs, Plotly's script included (some 5 MB): it opens from a disk, without network, and its
content security policy forbids any. Its style and script are report.css and report.js.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from megacl.report_plots import Style

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def render_page(*, title: str, kind: str, summary: Iterable[str], main: Iterable[str], footer: str) -> str:
    """A whole page. kind: what its title in the browser says beside `title`. All but that is HTML."""
    folder = Path(__file__).parent
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}: megacl {kind}</title>",
            f"<style>\n{(folder / 'report.css').read_text()}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{text(title)}</h1>",
            *summary,
            "</header>",
            "<main>",
            *main,
            "</main>",
            f"<footer><p>{footer}</p></footer>",
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{(folder / 'report.js').read_text()}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


@dataclass(frozen=True)
class Column:
    title: str
    number: bool = False
    wide: bool = False

    @property
    def attribute(self) -> str:
        """The class attribute of this column's cells, if any."""
        names = [name for name in ("number", "wide") if getattr(self, name)]
        return f' class="{" ".join(names)}"' if names else ""


def table(head: Sequence[Column], rows: Iterable[Sequence[str]], *, marks: Sequence[str] = ()) -> str:
    """A table that scrolls inside its own box; the first column names the row. marks: a class a row, for page.css."""
    cells = "".join(f'<th scope="col"{column.attribute}>{text(column.title)}</th>' for column in head)
    lines = []
    for index, row in enumerate(rows):
        mark = f' class="{marks[index]}"' if marks else ""
        first = f'<th scope="row"{head[0].attribute}>{text(row[0])}</th>'
        rest = "".join(
            f"<td{column.attribute}>{text(value)}</td>" for column, value in zip(head[1:], row[1:], strict=True)
        )
        lines.append(f"<tr{mark}>{first}{rest}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def plot(name: str, figure: str, description: str) -> str:
    """A place for a plot and the figure that report.js draws there; "<" is escaped so that no text ends the script."""
    data = figure.replace("<", "\\u003c")
    return (
        f'<div class="plot" role="img" aria-label="{text(description)}" data-figure="figure-{name}"></div>\n'
        f'<script type="application/json" id="figure-{name}">{data}</script>'
    )


_DASH_LENGTHS = {"solid": "none", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "10 4"}
_MARKER_SHAPES = {
    "circle": '<circle cx="17" cy="7" r="3.5"/>',
    "square": '<rect x="14" y="4" width="6" height="6"/>',
    "diamond": '<path d="M17 3 l4 4 l-4 4 l-4 -4 z"/>',
    "triangle-up": '<path d="M17 3 l4 7 h-8 z"/>',
    "x": '<path d="M14 4 l6 6 m0 -6 l-6 6" stroke="currentColor" stroke-width="2"/>',
}


def sample(style: Style, name: str, *, marker: bool = True) -> str:
    """A legend's entry: a piece of the line, and what it is."""
    shape = _MARKER_SHAPES[style.marker] if marker else ""
    return (
        f'<li><svg width="34" height="14" aria-hidden="true" style="color:{style.colour}" fill="currentColor">'
        f'<path d="M1 7 h32" stroke="currentColor" stroke-width="2" stroke-dasharray="{_DASH_LENGTHS[style.dash]}"/>'
        f"{shape}</svg>{text(name)}</li>"
    )


def text(value: str) -> str:
    """Text as it stands in a page."""
    return html.escape(value)


def number(value: float | None, form: str) -> str:
    """A number in a format of Python's, with a true minus sign; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def short(value: float) -> str:
    """A count for reading: 8,192 in full, then three digits and a unit: 819K, 1.31M, 300B, 12.0T."""
    if value < 10_000:
        return f"{value:,.0f}"
    for unit in "KMBT":
        value /= 1000
        if value < 999.5 or unit == "T":
            break
    return f"{value:#.3g}".rstrip(".") + unit


def duration(seconds: float) -> str:
    """A time for reading: 12.3 s, 6 min 12 s, 3 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
