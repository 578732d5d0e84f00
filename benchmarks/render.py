"""What is to be shown of results, and its renderers: for a terminal, as Markdown, and as a plot."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from benchmarks.timing import line
from runtime.files import write_picture

NOTHING = "–"
WHY = 160  # characters of why something did not run
# What C++ libraries put before the reason: where in their source it was found.
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
class Series:
    """Points of a plot, with a label for the legend if it is not empty; style and colour are Matplotlib's.

    If `fitted`, the straight line through three or more points is drawn. With `areas`, the points differ in size.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    colour: str | None = None
    fitted: bool = False
    areas: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `log` names the logarithmic ones, `ticks` are those of x, `beside` puts the legend outside."""

    x: str
    y: str
    series: Sequence[Series]
    log: str = ""
    ticks: Sequence[int] = ()
    title: str = ""
    beside: bool = False


@dataclass(frozen=True)
class Plot:
    """Panels side by side, with what is said of them where they can't be seen; width and height in inches."""

    alt: str
    panels: Sequence[Panel]
    size: tuple[float, float]


@dataclass(frozen=True)
class Page:
    """All that is shown of one file of results: a line about it, then tables, lines and at most one plot."""

    about: str
    parts: Sequence[Table | str]
    plot: Plot | None = None


def brief(why: str) -> str:
    """Why something did not run, in one short line without a C++ library's trace."""
    text = WHERE.sub("", why)
    if text != why and "name: " in text:  # OpenVINO names the node before it says what is wrong with it
        text = re.sub(r"\s*name: \S+", ":", text)
    return textwrap.shorten(text.removesuffix("Exception …").strip(), WHY, placeholder=" …")


def wide_console() -> Console:
    """Where tables go; wide enough for them if it is no terminal."""
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
    for axes, panel in zip(figure.subplots(1, len(plot.panels), squeeze=False)[0], plot.panels, strict=True):
        for series in panel.series:
            x, y, label = np.asarray(series.x), np.asarray(series.y), series.label or "_"
            if series.areas is not None:
                axes.scatter(x, y, s=series.areas, alpha=0.6, label=label)
                continue
            (points,) = axes.plot(x, y, series.style, color=series.colour, label=label)
            if series.fitted and len(x) >= 3:
                offset, slope = line(series.x, series.y)
                axes.plot(x, offset + slope * x, "-", color=points.get_color(), linewidth=1)
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.set_title(panel.title, parse_math=False)
        axes.set(xscale="log" if "x" in panel.log else "linear", yscale="log" if "y" in panel.log else "linear")
        if "y" not in panel.log:
            axes.set(ylim=(0, None))
        if "x" not in panel.log:
            axes.set(xlim=(0, None))
        if panel.ticks:
            axes.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
            axes.minorticks_off()
        if any(series.label for series in panel.series):
            where = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if panel.beside else {"fontsize": "small"}
            legend = axes.legend(**where)
            for handle, series in zip(legend.legend_handles, filter(lambda s: s.label, panel.series), strict=True):
                if series.areas is not None:
                    handle.set_sizes([40])
    write_picture(path, figure.savefig, dpi=120, metadata=metadata)
