"""`icnet data cutouts`: cut-outs with exact masks, sorted by class, from open emoji sets.

Emoji sets draw the same things in different styles: a class is an emoji, its members are the sets' drawings of it.
The sets are read as their npm packages `@iconify-json/NAME` ship them (`npm pack @iconify-json/noto` and so on): one
archive per set with all drawings as SVG, their names shared across the sets, and the set's licence.

Classes are split into training and test classes. Classes that share a word ("cat", "black-cat") come on the same side,
so a network is tested on classes that it has never seen.
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from rich.console import Console
from rich.progress import track

from runtime.errors import InputError
from runtime.files import check_outputs, replacing, write_bytes, write_picture

SIDE = 128  # longer side of a cut-out, pixels
MIN_SETS = 4  # drawings that make a class
TEST_SHARE = 0.25  # of the classes
# Flags, signs, smileys and people are left out: they differ in details only.
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
PASSED_OVER = ("oclock", "thirty", "moon", "globe")  # dozens of nearly the same clock, moon and earth
# Words that don't name a kind of thing: classes that share only these are unrelated.
COMMON = """
and at baby behind big black blue bowl box brown button closed cut done ear electric face facing fast fish flying
front fuel game glass good green half heart high hot house in japanese left light low lowered mark mobile mountain
new not of old on oncoming one open orange out over paper photo piece pot power rain raised red right rolled roller
round running shaped shirt shoe slow small snow soft speaker spiral star stick straight sun tear tilted timer tip two up
water white with without womans yellow
"""
COMMON_WORDS = frozenset(COMMON.split())


@dataclass(frozen=True)
class EmojiSet:
    """One set: its name, its licence, and its drawings as SVG by class."""

    name: str
    licence: str
    author: str
    version: str
    drawings: dict[str, str]
    categories: dict[str, str]  # class → category, empty if the set sorts its drawings in another way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data cutouts`."""
    parser.add_argument(
        "packages", type=Path, nargs="+", help="archives of several sets, from `npm pack @iconify-json/NAME`"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for train/ and test/CLASS/SET.png")


def run(args: argparse.Namespace) -> int:
    """Render the classes that enough sets draw.

    Raises:
        InputError: a file is not an emoji set's archive, or there are too few sets for a class.
        OutputError: a picture can't be written.
    """
    sets = [read_set(path) for path in args.packages]
    classes = shared_classes(sets)
    if not classes:
        raise InputError(f"no class is drawn by {MIN_SETS} of these {len(sets)} sets; give more sets")
    test = held_out(classes)
    pictures = {
        args.output / ("test" if name in test else "train") / name / f"{emoji_set.name}.png": emoji_set.drawings[name]
        for name in classes
        for emoji_set in sets
        if name in emoji_set.drawings
    }
    check_outputs([*pictures, args.output / "SOURCES.md"], args.packages)
    console = Console(stderr=True)
    for path, drawing in track(
        pictures.items(), description="rendering", console=console, transient=True, disable=not console.is_terminal
    ):
        with replacing(path) as temporary:
            write_picture(temporary, render(drawing).save)
    text = "# Sources of the cut-outs\n\n| set | version | author | licence |\n|---|---|---|---|\n"
    text += "".join(f"| {s.name} | {s.version} | {s.author} | {s.licence} |\n" for s in sets)
    with replacing(args.output / "SOURCES.md") as temporary:
        write_bytes(temporary, text.encode())
    print(f"{len(classes) - len(test)} classes for training, {len(test)} for testing, in {args.output}")
    return 0


def read_set(path: Path) -> EmojiSet:
    """Read an archive of npm's.

    Raises:
        InputError: not an archive, or not one of an emoji set.
    """
    try:
        with tarfile.open(path) as archive:
            package, icons, metadata, info = (_json(archive, name) for name in ("package", "icons", "metadata", "info"))
            size = f'width="{icons["width"]}" height="{icons["height"]}"'
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a package that `npm pack @iconify-json/NAME` wrote: {error}") from error
    bodies = {name: icon["body"] for name, icon in icons["icons"].items() if set(icon) == {"body"}}
    for name, alias in icons.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in bodies:
            bodies.setdefault(name, bodies[alias["parent"]])
    box = f'viewBox="0 0 {icons["width"]} {icons["height"]}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size} {box}>'
    return EmojiSet(
        icons["prefix"],
        info["license"]["spdx"],
        info["author"]["name"],
        package["version"],
        {name: f"{head}{body}</svg>" for name, body in bodies.items()},
        {name: category for category, names in metadata.get("categories", {}).items() for name in names},
    )


def _json(archive: tarfile.TarFile, name: str) -> dict[str, Any]:
    file = archive.extractfile(f"package/{name}.json")
    if file is None:
        raise KeyError(name)
    content: dict[str, Any] = json.load(file)
    return content


def shared_classes(sets: list[EmojiSet]) -> list[str]:
    """Names of the things that at least `MIN_SETS` sets draw, sorted."""
    drawn = Counter(name for emoji_set in sets for name in emoji_set.drawings)
    category = {name: where for emoji_set in sets for name, where in emoji_set.categories.items()}
    return sorted(
        name
        for name, count in drawn.items()
        if count >= MIN_SETS and category.get(name) in CATEGORIES and not any(word in name for word in PASSED_OVER)
    )


def related(first: str, second: str) -> bool:
    """Whether two classes share a word that names a kind of thing: "cat" and "black-cat"."""
    return bool((_words(first) & _words(second)) - COMMON_WORDS) or first == second


def _words(name: str) -> set[str]:
    return set(name.split("-"))


def held_out(classes: list[str]) -> set[str]:
    """The classes for testing: chosen by the names alone, so that the choice is the same everywhere."""
    return {name for family in families(classes) if _share(min(family)) < TEST_SHARE for name in family}


def families(classes: list[str]) -> Iterator[list[str]]:
    """The classes in sets that share words, directly or through other classes."""
    left = set(classes)
    by_word: dict[str, set[str]] = defaultdict(set)
    for name in classes:
        for word in _words(name) - COMMON_WORDS:
            by_word[word].add(name)
    while left:
        family, waiting = set(), {min(left)}
        while waiting:
            name = waiting.pop()
            family.add(name)
            waiting |= {other for word in _words(name) - COMMON_WORDS for other in by_word[word]} - family
        left -= family
        yield sorted(family)


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def render(svg: str) -> Image.Image:
    """A drawing as RGBA, cut to what is not transparent, its longer side `SIDE` pixels."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
