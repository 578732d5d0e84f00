"""`icnet bench report`: the tables and plots of the documents, made from the JSON files in `benchmarks/results/`.

In a page, a pair of comments holds what is made: `<!-- results: NAME -->` and `<!-- end of results -->`. NAME.json is
what `icnet bench latency`, `scaling`, `throughput`, `roofline` or `gpu-check` wrote with --output. `<!-- results: NAME
summary -->` asks for one small table, of latency only. A plot notes the digest of the JSON file that it was drawn from.
"""

import argparse
import os
import re
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.describe import PAGES, summary
from benchmarks.records import load
from benchmarks.render import Page, Plot, to_markdown, to_png
from runtime import InputError
from runtime.files import digest, replacing, write_bytes

DOCUMENTS = [Path("docs/benchmarks.md"), Path("docs/gpu.md"), Path("README.md")]
RESULTS = Path("benchmarks/results")
BLOCK = re.compile(r"(<!-- results: (\w+)( summary)? -->\n).*?(<!-- end of results -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench report`."""
    add = parser.add_argument
    add("documents", type=Path, nargs="*", metavar="PAGE.md", help=f"default: {' '.join(map(str, DOCUMENTS))}")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=f"the JSON files and plots (default {RESULTS})")
    add("--check", action="store_true", help="change nothing; exit code 1 if anything differs")


def run(args: argparse.Namespace) -> int:
    """Bring the blocks of the documents and their plots up to date.

    Returns:
        0; 1 with --check if something differs.

    Raises:
        InputError: a document, or a file of results that it names, can't be read.
        OutputError: a file can't be written.
    """
    texts: dict[Path, str] = {}
    stale: dict[Path, Plot] = {}
    for document in args.documents or DOCUMENTS:
        try:
            text = document.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{document}: can't be read: {error.strerror}") from error
        if (new := BLOCK.sub(partial(_block, document, args.results, stale), text)) != text:
            texts[document] = new
    if args.check:
        for path in (*texts, *stale):
            print(f"{path}: differs from the results; run icnet bench report")
        return 1 if texts or stale else 0
    for path, plot in stale.items():
        with replacing(path) as temporary:
            to_png(plot, temporary, {"Source": digest(path.with_suffix(".json"))})
    for document, text in texts.items():
        with replacing(document) as temporary:
            write_bytes(temporary, text.encode())
    for path in (*texts, *stale):
        print(f"{path}: written")
    return 0


def _block(document: Path, folder: Path, stale: dict[Path, Plot], match: re.Match[str]) -> str:
    """A block of a document made anew; notes its plot if it is missing or was drawn from other results."""
    source, image = folder / f"{match[2]}.json", folder / f"{match[2]}.png"
    page = _page(document, source, short=bool(match[3]))
    if page.plot and _drawn_from(image) != digest(source):
        stale[image] = page.plot
    link = Path(os.path.relpath(image, document.parent)).as_posix()
    return match[1] + "\n".join(to_markdown(page, link)).strip() + "\n" + match[4]


def _drawn_from(plot: Path) -> str | None:
    """The digest of the results that a plot was drawn from."""
    if not plot.is_file():
        return None
    with Image.open(plot) as image:
        return image.info.get("Source")


def _page(document: Path, path: Path, short: bool) -> Page:
    results = load(path)
    if short and results["kind"] != "latency":
        raise InputError(f"{document}: <!-- results: {path.stem} summary -->: there is a summary of latency only")
    try:
        return summary(results) if short else PAGES[results["kind"]](results)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # edited by hand, perhaps
        raise InputError(f"{path}: can't be read as results: {type(error).__name__}: {error}") from error
