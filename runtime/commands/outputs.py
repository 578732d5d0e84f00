"""What `icnet predict` writes of a group, at the choice of --write, and how full each map is."""

import argparse
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime import outputs
from runtime.commands.contact_sheet import contact_sheet
from runtime.commands.options import share
from runtime.errors import InputError
from runtime.files import json_bytes
from runtime.groups import Group
from runtime.preprocess import GroupPixels, restore_map, save_map

SHEET = "contact_sheet.jpg"
BOXES = "boxes.json"
KINDS = ("maps", "masks", "cutouts", "boxes")
FORMATS = ("png", "webp")  # with an alpha channel
SISMS = "sisms"  # the folder of the SISMs of a detector, if they are kept
# In a group's folder, and the suffixes in them.
FOLDERS = {"": (".png",), SISMS: (".png",), "masks": (".png",), "cutouts": (".png", ".webp")}
LEVEL = 0.5  # from which on a map's pixels count, unless --level says another, to tell how full it is

Write = Callable[[str, Callable[[BinaryIO], object]], None]


class Fullness(NamedTuple):
    """How full a map is.

    Attributes:
        name: GROUP/NAME.
        share: of its pixels, those from the level on.
    """

    name: str
    share: float


@dataclass(frozen=True)
class Outputs:
    """What is written of each group beside its contact sheet.

    Attributes:
        kinds: of `KINDS`.
        level: from which on pixels are in a mask; None for Otsu's.
        cutout_format: of `FORMATS`.
    """

    kinds: frozenset[str] = frozenset({"maps"})
    level: float | None = None
    cutout_format: str = "png"

    @property
    def counted_from(self) -> float:
        """The level from which on a map's pixels count, to tell how full it is."""
        return LEVEL if self.level is None else self.level

    def names(self, image: Path) -> dict[str, str]:
        """The files of an image in the group's folder, by their kinds."""
        names = {
            "maps": f"{image.stem}.png",
            "masks": f"masks/{image.stem}.png",
            "cutouts": f"cutouts/{image.stem}.{self.cutout_format}",
        }
        return {kind: name for kind, name in names.items() if kind in self.kinds}

    def all_names(self, group: Group) -> list[str]:
        """All files of a group."""
        names = [name for image in group.images for name in self.names(image).values()]
        return [*names, *([BOXES] if "boxes" in self.kinds else []), SHEET]

    def settings(self) -> dict[str, Any]:
        """What the content of these files depends on, but for models, images and SISMs."""
        return {"level": self.level} if self.kinds & {"masks", "boxes"} else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose what is written."""
    parser.add_argument(
        "--write",
        type=_kinds,
        default=Outputs.kinds,
        metavar="KINDS",
        help=f"what to write, of {', '.join(KINDS)}, separated by commas (default maps); cutouts and boxes take OpenCV",
    )
    parser.add_argument(
        "--level", type=share, help="pixels of a map from this value on, 0 to 1, are in its mask (default: Otsu's)"
    )
    parser.add_argument(
        "--cutout-format", type=_format, metavar="FORMAT", help=f"{' or '.join(FORMATS)} (default {FORMATS[0]})"
    )


def chosen(args: argparse.Namespace) -> Outputs:
    """What these options ask for.

    Raises:
        InputError: a format of cut-outs, but no cut-outs.
        DependencyError: what is asked for takes OpenCV, which is not installed.
    """
    if args.cutout_format and "cutouts" not in args.write:
        raise InputError(f"--cutout-format {args.cutout_format}: no cut-outs are written; add cutouts to --write")
    if needing := args.write & {"cutouts", "boxes"}:
        outputs.check_opencv(f"--write {','.join(sorted(needing, reverse=True))}")
    return Outputs(args.write, args.level, args.cutout_format or FORMATS[0])


def writes(
    group: Group, write: Write, asked: Outputs, pixels: GroupPixels, maps: NDArray[np.float32]
) -> list[Callable[[], Fullness | None]]:
    """What follows on a group's maps: calls that write its files.

    Args:
        group: the group.
        write: takes a file's name in the group's folder, and a call that saves it: `GroupResults.write`.
        asked: what is written.
        pixels: the group as the network took it.
        maps: float32 [N, 224, 224] in [0, 1].

    Returns:
        A call per image, which tells how full its map is; and one for the contact sheet.
    """
    return _Writer(group, write, asked, pixels, maps).calls()


class _Writer:
    """Writes one group's files, in several threads."""

    def __init__(
        self, group: Group, write: Write, asked: Outputs, pixels: GroupPixels, maps: NDArray[np.float32]
    ) -> None:
        self._group, self._write, self._asked, self._pixels, self._maps = group, write, asked, pixels, maps
        self._boxes: dict[int, list[outputs.Box]] = {}  # of each image
        self._lock = threading.Lock()

    def calls(self) -> list[Callable[[], Fullness | None]]:
        return [*(partial(self._write_image, i) for i in range(len(self._group.images))), self._write_sheet]

    def _write_image(self, i: int) -> Fullness:
        names, image = self._asked.names(self._group.images[i]), self._group.images[i]
        map_ = restore_map(self._maps[i], self._pixels.sizes[i])
        if "maps" in names:
            self._write(names["maps"], partial(save_map, map_))
        if "masks" in names or "boxes" in self._asked.kinds:
            mask = outputs.mask(map_, self._asked.level)
            if "masks" in names:
                self._write(names["masks"], partial(save_map, mask.astype(np.float32)))
            if "boxes" in self._asked.kinds:
                self._add_boxes(i, outputs.boxes(mask, map_))
        if "cutouts" in names:
            cutout = outputs.cutout(image, map_)
            self._write(names["cutouts"], partial(_save_cutout, cutout, self._asked.cutout_format))
        share = float((self._maps[i] >= self._asked.counted_from).mean())
        return Fullness(f"{self._group.name}/{image.stem}", share)

    def _add_boxes(self, i: int, boxes: list[outputs.Box]) -> None:
        """Keep an image's boxes; with those of the last one, write the file."""
        with self._lock:
            self._boxes[i] = boxes
            complete = len(self._boxes) == len(self._group.images)
        if complete:
            content = json_bytes(_coco(self._group, self._pixels, self._boxes))
            self._write(BOXES, lambda file: file.write(content))

    def _write_sheet(self) -> None:
        pixels, cutouts = self._pixels, "cutouts" in self._asked.kinds
        sheet = contact_sheet(pixels.images, pixels.sisms, self._maps, pixels.sizes, self._group.name, cutouts)
        self._write(SHEET, partial(sheet.save, format="JPEG", quality=90))


def _coco(group: Group, pixels: GroupPixels, boxes: dict[int, list[outputs.Box]]) -> dict[str, Any]:
    """A group's boxes in COCO's format for object detection, with a score as in its format for results."""
    images = [
        {"id": i + 1, "file_name": image.name, "width": size[0], "height": size[1]}
        for i, (image, size) in enumerate(zip(group.images, pixels.sizes, strict=True))
    ]
    found = [(i, box) for i in sorted(boxes) for box in boxes[i]]
    annotations = [
        {
            "id": number,
            "image_id": i + 1,
            "category_id": 1,
            "bbox": list(box.bbox),
            "area": box.area,
            "iscrowd": 0,
            "score": round(box.score, 4),
        }
        for number, (i, box) in enumerate(found, 1)
    ]
    return {
        "info": {"description": f"co-salient objects of the group {group.name}"},
        "licenses": [],
        "categories": [{"id": 1, "name": "co-salient", "supercategory": "object"}],
        "images": images,
        "annotations": annotations,
    }


def _save_cutout(rgba: NDArray[np.uint8], format: str, file: BinaryIO) -> None:
    # PNG: zlib's fastest level; the others take several times as long for a tenth of the size.
    options: dict[str, Any] = {"compress_level": 1} if format == "png" else {"quality": 90}
    Image.fromarray(rgba).save(file, format=format, **options)


def _kinds(text: str) -> frozenset[str]:
    kinds = frozenset(kind.strip() for kind in text.split(","))
    if unknown := sorted(kinds - set(KINDS)):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}, got {', '.join(map(repr, unknown))}")
    return kinds


def _format(text: str) -> str:
    name = text.lower().removeprefix(".")
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} has no alpha channel, or is unknown; cut-outs are png or webp")
    return name
