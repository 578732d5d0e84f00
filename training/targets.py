"""`icnet data targets`: what a detector of salient objects finds in photographs without labels, for another to learn.

Every photograph gives several *views*: the whole of it, and crops of it, on which other things stand out. Pictures with
transparent pixels are no photographs, and passed over; so are small ones.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from runtime.commands.options import number
from runtime.errors import InputError
from runtime.files import check_outputs, replacing, write_picture
from runtime.groups import image_files
from runtime.preprocess import rgb_image

SIDE = 320  # of a view, pixels: that of U²-Net's input
MIN_SIDE = 150  # of a photograph, pixels
MAX_SIDE = 1280  # a larger one is made smaller first
SHARES, LOG_ASPECT = (0.2, 0.9), 0.35  # of a crop's area; and of its aspect ratio against the photograph's
SURE = 128  # of 255: a map that reaches it is stretched to 0 … 255; a fainter one says that nothing stands out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data targets`."""
    parser.add_argument("photographs", type=Path, help="folder of them, of any depth")
    parser.add_argument("--teacher", type=Path, required=True, help="a detector, such as u2netp.onnx")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for img/NAME/K.jpg and sism/NAME/K.png"
    )
    parser.add_argument("--views", type=number(), default=8, help="of each photograph (default 8)")


def run(args: argparse.Namespace) -> int:
    """Write the views and their maps; those that are there already are kept.

    Raises:
        InputError: there is no photograph, or one can't be read.
        ModelError: the teacher is not a detector.
        OutputError: a file can't be written.
    """
    from runtime.detector import Detector, finished

    check_outputs([args.output], [args.photographs, args.teacher])
    files = photographs(args.photographs)
    if not files:
        raise InputError(f"{args.photographs}: no photographs")
    console = Console(stderr=True)
    bar = track(files, description="views", console=console, transient=True, disable=not console.is_terminal)
    teacher = Detector(args.teacher, minmax=False)
    for path in bar:
        missing = [k for k in range(args.views) if not (args.output / f"sism/{path.stem}/{k}.png").exists()]
        for k, view in views(path, missing):
            seen = teacher.look(np.asarray(view), path.name)
            _write(args.output, f"{path.stem}/{k}", view, target(finished(seen, teacher([seen])[0])))
    print(f"{args.views} views of {len(files)} photographs in {args.output}")
    return 0


def photographs(folder: Path) -> list[Path]:
    """The pictures in a folder of any depth that are large enough and have no transparent pixel, sorted."""
    found = []
    for path in sorted(file for f in (folder, *folder.rglob("*")) if f.is_dir() for file in image_files(f)):
        with Image.open(path) as image:
            alpha = image.getchannel("A").getextrema()[0] if "A" in image.getbands() else 255
            if alpha == 255 and min(image.size) >= MIN_SIDE:
                found.append(path)
    return found


def views(path: Path, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """The views of a photograph with these numbers, RGB, 320×320; 0 is the whole."""
    if not numbers:
        return
    image = rgb_image(path, "photograph")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    for k in numbers:
        box = (0, 0, *image.size)
        if k:
            rng = np.random.default_rng([k, *path.stem.encode()])
            share, aspect = rng.uniform(*SHARES), float(np.exp(rng.uniform(-LOG_ASPECT, LOG_ASPECT)))
            width, height = (
                min(side, round(side * np.sqrt(share * factor)))
                for side, factor in zip(image.size, (aspect, 1 / aspect), strict=True)
            )
            left, top = (int(rng.integers(room + 1)) for room in (image.width - width, image.height - height))
            box = (left, top, left + width, top + height)
        yield k, image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)


def target(sism: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The map to learn: the teacher's, stretched if anything in it stands out."""
    levels = sism.astype(np.float32)
    low, high = float(levels.min()), float(levels.max())
    return np.rint((levels - low) * (255 / (high - low))).astype(np.uint8) if high >= SURE and high > low else sism


def _write(folder: Path, name: str, view: Image.Image, sism: NDArray[np.uint8]) -> None:
    with replacing(folder / "img" / f"{name}.jpg") as temporary:
        write_picture(temporary, view.save, quality=93)
    with replacing(folder / "sism" / f"{name}.png") as temporary:  # last: a view is there if its map is
        write_picture(temporary, Image.fromarray(sism).save)
