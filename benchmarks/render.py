"""A page of results, and its renderers: for a terminal, as Markdown, and its plot as a PNG file."""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from runtime.files import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "–"
MAX_REASON = 160  # characters of why something did not run
# C++ libraries put the place in their source before the reason.
WHERE = re.compile(
    r"Exception from \S+:\d+:\s*|Check '[^']*' failed at \S+:\d+:\s*|Details:\s*|\[ONNXRuntimeError\][ :]*"
)


@dataclass(frozen=True)
class Table:
    """A table; a column is left out if no row has anything in it.

    The first `texts` columns hold text, the others numbers. `grouped` rows belong together if their first cells are
    equal. `note` says what the headings mean.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    grouped: bool = False
    note: str = ""

    def columns(self) -> list[int]:
        """The indices of the columns that are shown."""
        filled = [any(row[i] != NOTHING for row in self.rows) for i in range(len(self.heading))]
        return [i for i, shown in enumerate(filled) if shown]


@dataclass(frozen=True)
class Plot:
    """A plot: its text for those who can't see it, width and height in inches, and the function that draws it."""

    alt: str
    size: tuple[float, float]
    draw: Callable[["Figure"], None]


@dataclass(frozen=True)
class Page:
    """What is shown of one file of results: a line about it, then tables, lines and at most one plot."""

    about: str
    parts: Sequence[Table | str]
    plot: Plot | None = None


def brief(why: str) -> str:
    """The reason why something did not run, in one short line without a C++ library's trace."""
    text = WHERE.sub("", why)
    if text != why and "name: " in text:  # OpenVINO names the node before it says what is wrong with it
        text = re.sub(r"\s*name: \S+", ":", text)
    return textwrap.shorten(text.removesuffix("Exception …").strip(), MAX_REASON, placeholder=" …")


def wide_console() -> Console:
    """Standard output; wide enough for the tables if it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 140
    return console


def to_terminal(page: Page, console: Console) -> None:
    """Print a page."""

    def plain(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    plain(page.about)
    for part in page.parts:
        if isinstance(part, str):
            plain(part)
            continue
        grid = Grid(title=escape(part.title), caption=escape(part.note) or None)
        columns, last = part.columns(), None
        for i in columns:
            text = i < part.texts
            grid.add_column(escape(part.heading[i]), justify="left" if text else "right", no_wrap=not text)
        for row in part.rows:
            if part.grouped and last not in (None, row[0]):
                grid.add_section()
            last = row[0]
            grid.add_row(*(escape(row[i]) for i in columns))
        console.print(grid)


def to_markdown(page: Page, image: str) -> list[str]:
    """The lines of a page, whose plot has the address `image`."""
    lines = [page.about, ""]
    if page.plot:
        lines += [f"![{page.plot.alt}]({image})", ""]
    for part in page.parts:
        if isinstance(part, str):
            lines.append(f"- {part}")
            continue
        if lines[-1]:
            lines.append("")
        columns = part.columns()
        rule = "|" + "".join("---|" if i < part.texts else "---:|" for i in columns)
        cells = [[row[i].replace("|", "\\|") for i in columns] for row in (part.heading, *part.rows)]
        rows = [f"| {' | '.join(row)} |" for row in cells]
        lines += [f"{part.title}:", "", rows[0], rule, *rows[1:], ""]
        if part.note:
            lines += [f"{part.note[0].upper()}{part.note[1:]}.", ""]
    return lines


def to_png(plot: Plot, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Draw a plot; needs Matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=plot.size, layout="constrained")
    plot.draw(figure)
    write_picture(path, figure.savefig, dpi=120, metadata=metadata)
