"""The report of `icnet predict` or `icnet evaluate`: pages that need nothing but a browser, and can be mailed.

Pictures lie in the pages, at the network's size (224×224). Masks and cut-outs are made in the page, at the threshold
that is set there. A run of more than `PAGE_IMAGES` images becomes several pages, and `report.html` their index.
"""

import base64
import hashlib
import html
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime import __version__
from runtime.contract import SIZE
from runtime.errors import ICNetError, OutputError, printable
from runtime.files import output_errors, replacing, write_bytes
from runtime.grey import grey_levels
from runtime.groups import Group
from runtime.preprocess import GroupPixels, ImageSource, grey_image, reads, stack

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name(REPORT)
PAGE_IMAGES = 200  # about 6 MB
MARK = '<meta name="generator" content="{}">'  # by which a command's own report is known
HEAD_BYTES = 1000  # of a file, in which the mark stands
T = TypeVar("T")
Follow = Callable[[GroupPixels, NDArray[np.float32]], list[Callable[[], T]]]
PAGE = re.compile(r"report-\d{3,}\.html")
TOOLS = """<div id="tools">
<label>Threshold <output id="level">128</output>
<input type="range" id="threshold" min="1" max="255" value="128"></label>
<label>Group <select id="group"><option value="">all</option>{options}</select></label>
<label><input type="checkbox" id="empty"> only empty masks</label>
<span id="shown" role="status"></span>
<span class="keys">Keys: j, k next and previous; + − threshold; z zoom; e empty masks</span>
</div>"""


@dataclass
class Entry:
    """A group in the report, or what went wrong.

    sections: of at most `PAGE_IMAGES` images each: their number, and the place and length of the HTML in a file.
    """

    name: str
    images: int = 0
    note: str = ""
    place: tuple[float, ...] = ()
    sections: list[tuple[int, int, int]] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Judged:
    """What ground truths say of a group's maps.

    ground_truths: uint8 [N, 224, 224]. notes: the scores of each image, as text; note: of the group. place: groups
    stand in the order of their places.
    """

    ground_truths: NDArray[np.uint8]
    notes: Sequence[str]
    note: str
    place: tuple[float, ...]


class Report:
    """The report of one run. Several threads may add groups; they stand in the order of their numbers.

    Args:
        folder: where its pages go.
        facts: what the page says of the run, e.g. the model and the engine.
        command: who makes it; it replaces reports of the same command only.

    Attributes:
        summary: HTML above the groups.

    Raises:
        OutputError: a file of another is in its place, or the folder can't be made or written to.
    """

    def __init__(self, folder: Path, facts: Sequence[str], command: str = "icnet predict") -> None:
        self.folder, self.facts, self.summary = folder, [*facts], ""
        self._mark = MARK.format(command)
        self._entries: dict[int, Entry] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Those of a large run don't fit into memory.
            self._sections = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (`write` closes it)
        for path in (folder / REPORT, *self._pages()):
            if (path.exists() or path.is_symlink()) and not self._is_ours(path):
                raise OutputError(f"{path}: was not made by {command} and would be overwritten; move it away")

    def following(
        self, number: int, group: Group, follow: Follow[T], pixels: GroupPixels, maps: NDArray[np.float32]
    ) -> list[Callable[[], T | None]]:
        """What follows on a group's maps, and one call more, that adds the group.

        Args:
            number: as for `add`.
            group: likewise.
            follow: what follows without a report, e.g. `outputs.writes` for this group.
            pixels: the group as the network took it.
            maps: float32 [N, 224, 224] in [0, 1].
        """
        return [*follow(pixels, maps), partial(self.add, number, group, pixels, maps)]

    def add(
        self,
        number: int,
        group: Group,
        pixels: GroupPixels,
        maps: NDArray[np.float32],
        sisms_known: bool = True,
        judged: Judged | None = None,
    ) -> None:
        """Add a group.

        Args:
            number: its place among the groups.
            group: its name and the images' names.
            pixels: the group as the network took it.
            maps: float32 [N, 224, 224] in [0, 1].
            sisms_known: whether the SISMs are shown.
            judged: what is shown beside the maps.
        """
        n = len(maps)
        entry = Entry(group.name, n, *((judged.note, judged.place) if judged else ()))
        notes = [f"{n} image{'s' * (n != 1)}", *([judged.note] if judged else ())]
        title = f"<bdi>{escaped(group.name)}</bdi> <small>{escaped(', '.join(notes))}</small>"
        for first in range(0, n, PAGE_IMAGES):
            chosen = range(first, min(first + PAGE_IMAGES, n))
            rows = "".join(
                _article(
                    *(group, group.images[i].name, pixels.images[i], pixels.sisms[i] if sisms_known else None),
                    *(grey_levels(maps[i]), pixels.sizes[i]),
                    *((judged.ground_truths[i], judged.notes[i]) if judged else ()),
                )
                for i in chosen
            )
            section = f"<section>\n<h2>{title}</h2>\n{rows}</section>\n".encode()
            with self._lock, output_errors(self.folder):
                entry.sections.append((len(chosen), self._sections.seek(0, os.SEEK_END), len(section)))
                self._sections.write(section)
        with self._lock:
            self._entries[number] = entry

    def add_finished(self, number: int, group: Group, folder: Path) -> None:
        """Add a group that an earlier run has finished, from its images, SISM files and maps in `folder`.

        Raises:
            InputError: one of them can't be read.
        """
        files = [folder / f"{image.stem}.png" for image in group.images]
        if not all(file.exists() for file in files):  # masks or cut-outs alone were asked for
            with self._lock:
                self._entries[number] = Entry(group.name, error="finished by an earlier run, which wrote no maps")
            return
        self.add_read(number, group, files)

    def add_read(self, number: int, group: Group, maps: Sequence[ImageSource], judged: Judged | None = None) -> None:
        """Add a group from its files, and its maps of any size; other arguments as for `add`.

        Raises:
            InputError: an image, SISM or map can't be read.
        """
        unknown = [np.zeros((SIZE, SIZE), np.uint8)] * len(maps)
        pixels = stack([read() for read in reads(group.images, group.sisms or unknown)])
        levels = np.stack([grey_image(map_, (SIZE, SIZE)) for map_ in maps])
        self.add(number, group, pixels, levels.astype(np.float32) / np.float32(255), group.sisms is not None, judged)

    def add_failed(self, number: int, name: str, error: ICNetError) -> None:
        """Add a group that has no maps."""
        with self._lock:
            self._entries[number] = Entry(name, error=str(error))

    def write(self) -> Path:
        """Write the pages, and delete those of an earlier run that are more.

        Returns:
            The page to open first.

        Raises:
            OutputError: one can't be written.
        """
        entries = [self._entries[number] for number in sorted(self._entries)]
        entries.sort(key=lambda entry: entry.place)
        count = sum(entry.images for entry in entries)
        seconds = time.monotonic() - self._started
        facts = [
            *self.facts,
            f"{len(entries)} group{'s' * (len(entries) != 1)}, {count} image{'s' * (count != 1)}",
            f"{seconds:.1f} s with reading and writing",
            f"icnet-deploy {__version__}",
        ]
        pages = _pages(entries)
        names = [REPORT] if len(pages) < 2 else [f"report-{i + 1:03}.html" for i in range(len(pages))]
        links = [f'<a href="{name}">{i + 1}</a>' for i, name in enumerate(names)]
        for i, (name, page) in enumerate(zip(names, pages, strict=True)):
            around = f'<p>Page {i + 1} of {len(pages)}; <a href="{REPORT}">index</a></p>' if len(pages) > 1 else ""
            options = dict.fromkeys(entry.name for entry, *_ in page if entry.images)
            tools = TOOLS.format(options="".join(f"<option>{escaped(option)}</option>" for option in options))
            head = around or self.summary
            self._write(name, facts, head, tools + "".join(self._section(*one) for one in page))
        if len(pages) > 1:
            rows = [
                f"<tr><td>{escaped(entry.name)}<td>{entry.images or ''}<td>"
                + (" ".join(link for link, page in zip(links, pages, strict=True) if any(e is entry for e, *_ in page)))
                + (f"<td>{escaped(entry.note)}" if self.summary else "")
                for entry in entries
            ]
            heads = "<th>".join(["group", "images", "page", *(["scores"] if self.summary else [])])
            table = f"<table><tr><th>{heads}\n{chr(10).join(rows)}\n</table>"
            self._write(REPORT, facts, self.summary, table)
        for path in self._pages():
            if path.name not in names and self._is_ours(path):
                with output_errors(path):
                    path.unlink()
        self._sections.close()
        return self.folder / REPORT

    def _section(self, entry: Entry, at: int, length: int) -> str:
        if not length:
            name, problem = escaped(entry.name), escaped(entry.error)
            return f'<section><h2><bdi>{name}</bdi></h2><p class="error">{problem}</p></section>\n'
        with output_errors(self.folder):
            self._sections.seek(at)
            return self._sections.read(length).decode()

    def _write(self, name: str, facts: Sequence[str], head: str, body: str) -> None:
        template = TEMPLATE.read_text(encoding="utf-8")
        parts = {tag: re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL) for tag in ("style", "script")}
        allowed = {tag: _digest(found[1]) for tag, found in parts.items() if found}
        values = {
            "policy": "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            + "; ".join(f"{tag}-src '{digest}'" for tag, digest in allowed.items()),
            "mark": self._mark,
            "title": "Co-saliency maps",
            "facts": " · ".join(map(escaped, facts)),
            "head": head,
            "body": body,
        }
        # In one pass: what a value holds is not looked at again.
        page = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
        with replacing(self.folder / name) as temporary:
            write_bytes(temporary, page.encode())

    def _pages(self) -> list[Path]:
        with output_errors(self.folder):
            return [path for path in self.folder.iterdir() if PAGE.fullmatch(path.name)]

    def _is_ours(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return not path.is_symlink() and self._mark.encode() in file.read(HEAD_BYTES)
        except OSError:
            return False


def _pages(entries: Sequence[Entry]) -> list[list[tuple[Entry, int, int]]]:
    """Which sections stand on which page, as place and length; errors have none, and take no room."""
    pages: list[list[tuple[Entry, int, int]]] = [[]]
    room = PAGE_IMAGES
    for entry in entries:
        for images, at, length in entry.sections or [(0, 0, 0)]:
            if images > room:
                pages.append([])
                room = PAGE_IMAGES
            pages[-1].append((entry, at, length))
            room -= images
    return pages


def _article(
    group: Group,
    name: str,
    image: NDArray[np.uint8],
    sism: NDArray[np.uint8] | None,
    map_: NDArray[np.uint8],
    size: tuple[int, int],
    ground_truth: NDArray[np.uint8] | None = None,
    note: str = "",
) -> str:
    """An image's row. Its map is stored without loss, so that the page's counts are exact."""
    views = {
        "photograph": f'<img class="photo" alt="photograph" src="{_uri(image, "jpeg", quality=85)}">',
        "SISM": "<img alt="
        + ('"unknown SISM">' if sism is None else f'"SISM" src="{_uri(sism, "jpeg", quality=85)}">'),
        "map": f'<img class="map" alt="map" src="{_uri(map_, "png", optimize=True)}">',
    }
    if ground_truth is not None:
        views["ground truth"] = f'<img alt="ground truth" src="{_uri(ground_truth, "png", optimize=True)}">'
    for caption in ("overlay", "mask", "cut-out"):
        views[caption] = (
            f'<canvas class="{caption}" width="{SIZE}" height="{SIZE}" role="img" aria-label="{caption}"></canvas>'
        )
    figures = "".join(f"<figure>{view}<figcaption>{caption}</figcaption></figure>" for caption, view in views.items())
    ratio = min(max(size[0] / size[1], 1 / 4), 4) if math.prod(size) else 1
    return (
        f'<article tabindex="0" data-group="{escaped(group.name)}" data-ratio="{ratio:.4f}">\n'
        f"<h3><bdi>{escaped(name)}</bdi> "
        f'<small>{size[0]}×{size[1]}, <span class="share"></span>{escaped(note and f", {note}")}</small></h3>\n'
        f'<div class="views">{figures}</div>\n</article>\n'
    )


def _uri(pixels: NDArray[np.uint8], kind: str, **options: object) -> str:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def escaped(text: object) -> str:
    """Any text as HTML, in an attribute too; what would turn or hide other text is written out."""
    return html.escape(printable(text), quote=True)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
