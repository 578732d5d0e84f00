"""Groups of image files on disk: one image, one folder, or the layout of the co-saliency data sets.

PATH.jpg                                          a group of one, named after its file
PATH/*.jpg                                        one group, named after its folder
PATH/img/GROUP/*.jpg, PATH/sism/GROUP/NAME.png    a data set
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from runtime.errors import InputError, how_to_install

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
}  # fmt: skip
HEIF = {".heic", ".heif", ".hif"}  # images too where pillow-heif is installed
MAX_NAMES = 20  # in a message


@dataclass(frozen=True)
class Group:
    """The images of one group, in order of their names, and each one's SISM (None: there are no SISM files).

    Of a group that can't be used, `problem` says why. `passed_over` are the files beside the images whose suffix is not
    an image's.
    """

    name: str
    images: tuple[Path, ...]
    sisms: tuple[Path, ...] | None
    problem: InputError | None = None
    passed_over: tuple[Path, ...] = ()


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of images, in lower case: `SUFFIXES`, and those of `HEIF` if pillow-heif is installed."""
    return frozenset(SUFFIXES | HEIF if importlib.util.find_spec("pillow_heif") else SUFFIXES)


def heif_hint(files: Sequence[Path]) -> str:
    """What to install if any of these files is passed over for want of it; "" otherwise."""
    missing = any(file.suffix.lower() in HEIF - suffixes() for file in files)
    return f"; to read HEIC and HEIF: {how_to_install('heif')}" if missing else ""


def find_groups(path: Path, sisms: Path | None) -> list[Group]:
    """The groups at `path`, and the SISM of every image.

    Args:
        path: a folder of images, one image, or a data set with an `img` folder of groups.
        sisms: the folder of SISMs, which has NAME.png (or another image suffix) for image NAME.jpg: directly for one
            group, in a folder per group for a data set. For one image, its SISM will do. None: do without.

    Raises:
        InputError: no such folder; or, in a folder of one group, no images, two of one name, or one without a SISM. In
            a data set such a group has it as its `problem`, so that the others can go on.
    """
    check_folder(path)
    if path.is_file() and sisms is not None and sisms.is_file():
        return [Group(path.stem, (path,), (sisms,))]
    if sisms is not None and not sisms.is_dir():
        raise InputError(
            f"{sisms}: {'not a folder' if sisms.exists() else 'no such folder'} (it should hold the SISMs)"
        )
    if path.is_file():
        return [Group(path.stem, (path,), None if sisms is None else matching([path], sisms, "SISM"))]
    if not (path / "img").is_dir():
        name = Path(os.path.abspath(path)).name  # noqa: PTH100  (a link keeps its own name)
        return [_group(name or "group", path, sisms)]
    folders = [f for f in _entries(path / "img") if f.is_dir()]
    if not folders:
        raise InputError(f"{path / 'img'}: holds no folders of groups; expected img/GROUP/NAME.jpg")
    groups = []
    for folder in folders:
        try:
            groups.append(_group(folder.name, folder, None if sisms is None else sisms / folder.name))
        except InputError as problem:
            groups.append(Group(folder.name, (), None, problem))
        except OSError as error:  # a folder that may be listed, and nothing more
            reason = f"{error.filename or folder}: can't be read: {error.strerror or error}"
            groups.append(Group(folder.name, (), None, InputError(reason)))
    return groups


def check_folder(path: Path) -> None:
    """Raise InputError unless `path` is an image file, a data set, or a folder that may hold the images of a group."""
    if path.is_file() and path.suffix.lower() in suffixes():
        return
    if not path.is_dir():
        problem = "neither a folder nor an image" if path.exists() else "no such folder"
        raise InputError(f"{path}: {problem}{heif_hint([path]) if path.exists() else ''}")
    if (path / "img").is_dir() or image_files(path):
        return
    if folders := [f.name for f in _entries(path) if f.is_dir()]:
        several = ", ".join(folders[:3]) + ", …" * (len(folders) > 3)
        raise InputError(
            f"{path}: no images in it, but folders ({several}). Name one of them, or arrange a data set: the images in "
            f"{path / 'img'}/GROUP/, their SISMs in {path / 'sism'}/GROUP/"
        )


def _group(name: str, folder: Path, sism_folder: Path | None) -> Group:
    images = image_files(folder)
    passed_over = tuple(f for f in _entries(folder) if f.suffix.lower() not in suffixes() and not f.is_dir())
    if not images:
        looked_for = ", ".join(sorted(suffixes()))
        raise InputError(f"{folder}: no images in it (looked for {looked_for}){heif_hint(passed_over)}")
    check_names(str(folder), images)
    sisms = None if sism_folder is None else matching(images, sism_folder, "SISM")
    return Group(name, tuple(images), sisms, passed_over=passed_over)


def check_names(where: str, images: Sequence[Path]) -> None:
    """Raise InputError, which begins with `where`, if the maps of two images of a group would have one name."""
    by_stem: dict[str, Path] = {}
    for image in images:
        other = by_stem.setdefault(image.stem, image)
        if other is not image:
            raise InputError(f"{where}: {other.name} and {image.name} would both become {image.stem}.png; rename one")


def matching(images: Sequence[Path], folder: Path, what: str) -> tuple[Path, ...]:
    """The file in `folder` that belongs to each image: NAME.png, or another image suffix, for image NAME.jpg.

    Args:
        images: image files of one group.
        folder: holds the files directly; others may lie there too.
        what: what messages call such a file, e.g. "SISM".

    Raises:
        InputError: an image has none, or there are two of one name.
    """
    available: dict[str, Path] = {}
    for file in image_files(folder) if folder.is_dir() else ():
        other = available.setdefault(file.stem, file)
        if other != file:
            raise InputError(
                f"{folder}: {other.name} and {file.name} could both be the {what} of {file.stem}; remove one"
            )
    missing = [image for image in images if image.stem not in available]
    if len(missing) > 1:
        names = ", ".join(image.name for image in missing[:MAX_NAMES]) + ", …" * (len(missing) > MAX_NAMES)
        raise InputError(
            f"{missing[0].parent}: no {what} for {len(missing)} of {len(images)} images ({names}): expected "
            f"{folder / missing[0].stem}.png and so on"
        )
    for image in missing:
        raise InputError(f"{image}: no {what} for it: expected {folder / image.stem}.png")
    return tuple(available[image.stem] for image in images)


def image_files(folder: Path) -> list[Path]:
    """What should be image files directly in `folder`, by name; hidden files and other suffixes are passed over.

    Raises:
        InputError: the folder can't be read.
    """
    return [f for f in _entries(folder) if f.suffix.lower() in suffixes() and not f.is_dir()]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, by name."""
    try:
        return sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: can't be read: {error.strerror or error}") from error
