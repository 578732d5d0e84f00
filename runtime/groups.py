"""Groups of image files on disk: one folder, or the layout of the co-saliency data sets.

PATH/*.jpg                                        one group, named after its folder
PATH/img/GROUP/*.jpg, PATH/sism/GROUP/NAME.png    a data set
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Group:
    """The images of one group, in order of their names, and each one's SISM (None: there are no SISM files)."""

    name: str
    images: tuple[Path, ...]
    sisms: tuple[Path, ...] | None


def find_groups(path: Path, sisms: Path | None) -> list[Group]:
    """The groups at `path`, and the SISM of every image.

    Args:
        path: a folder of images, or a data set with an `img` folder of groups.
        sisms: the folder of SISMs, which has NAME.png (or another image suffix) for image NAME.jpg: directly for one
            group, in a folder per group for a data set. None: do without.

    Raises:
        InputError: no such folder, a group without images, two images of one name, or an image without a SISM.
    """
    if not path.is_dir():
        raise InputError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if sisms is not None and not sisms.is_dir():
        raise InputError(
            f"{sisms}: {'not a folder' if sisms.exists() else 'no such folder'} (it should hold the SISMs)"
        )
    if not (path / "img").is_dir():
        return [_group(path.resolve().name, path, sisms)]
    folders = sorted(f for f in (path / "img").iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise InputError(f"{path / 'img'}: holds no folders of groups")
    return [_group(f.name, f, None if sisms is None else sisms / f.name) for f in folders]


def _group(name: str, folder: Path, sism_folder: Path | None) -> Group:
    images = image_files(folder)
    if not images:
        raise InputError(f"{folder}: no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    by_stem: dict[str, Path] = {}
    for image in images:
        if image.stem in by_stem:
            raise InputError(
                f"{folder}: {by_stem[image.stem].name} and {image.name} would both become {image.stem}.png"
            )
        by_stem[image.stem] = image
    return Group(name, tuple(images), None if sism_folder is None else tuple(_sisms(images, sism_folder)))


def _sisms(images: Sequence[Path], folder: Path) -> list[Path]:
    available: dict[str, Path] = {}
    for file in image_files(folder) if folder.is_dir() else ():
        other = available.setdefault(file.stem, file)
        if other != file:
            raise InputError(f"{folder}: {other.name} and {file.name} could both be the SISM of {file.stem}")
    for image in images:
        if image.stem not in available:
            raise InputError(f"{image}: no SISM for it: expected {folder / image.stem}.png")
    return [available[image.stem] for image in images]


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, by name; hidden files and other suffixes are passed over."""
    return sorted(
        f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file()
    )
