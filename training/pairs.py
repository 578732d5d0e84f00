"""`icnet data pairs`: a data set of whole photographs, two side by side in each image, of which one is common.

Photographs lie in CLASS/NAME, a detector's map of each in CLASS/NAME.png in a folder of its own. A group is a class:
each of its photographs stands beside one of another class, in turn on the left and on the right. The SISM is both maps,
the ground truth the common side's, from 0.5 on. With `--alone` nothing stands beside them: then the SISM is right, and
a network has nothing to do but to keep it.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from runtime.commands.options import number
from runtime.errors import InputError
from runtime.files import replacing, write_picture
from runtime.groups import image_files, matching
from runtime.preprocess import grey_image, read_image
from training.paste import Pixels

HEIGHT = 320  # of a photograph, pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data pairs`."""
    parser.add_argument("photographs", type=Path, help="folder with CLASS/NAME.jpg, two classes or more")
    parser.add_argument("maps", type=Path, help="folder with CLASS/NAME.png, a detector's maps, checked by eye")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DATA", help="data set: img/, gt/, sism/")
    parser.add_argument("--alone", action="store_true", help="one photograph in each image")
    parser.add_argument("--seed", type=number(0), default=0, metavar="N", help="of the pairs (default 0)")


def run(args: argparse.Namespace) -> int:
    """Write the data set.

    Raises:
        InputError: a map is missing, a file can't be read, or there are fewer than two classes.
        OutputError: a file can't be written.
    """
    if args.output.exists():
        raise InputError(f"{args.output}: is there already; choose another --output")
    if not args.photographs.is_dir():
        raise InputError(f"{args.photographs}: no such folder of photographs")
    classes = {}
    for folder in sorted(path for path in args.photographs.iterdir() if path.is_dir()):
        images = image_files(folder)
        files = zip(images, matching(images, args.maps / folder.name, "map"), strict=True)
        classes[folder.name] = [_scaled(image, map_) for image, map_ in files]
    if len(classes) < 2:
        raise InputError(f"{args.photographs}: pairs need photographs of two classes, in a folder each")
    rng = np.random.default_rng(args.seed)
    for name, photographs in classes.items():
        others = [photograph for other in classes if other != name for photograph in classes[other]]
        chosen = rng.permutation(len(others))
        for i, (image, map_) in enumerate(photographs):
            truth = np.where(map_ > 127, 255, 0).astype(np.uint8)
            parts = [(image, map_, truth)]
            if not args.alone:
                other, other_map = others[chosen[i % len(others)]]
                parts.insert(i % 2, (other, other_map, np.zeros_like(other_map)))
            whole = [np.concatenate(planes, 1) for planes in zip(*parts, strict=True)]
            for kind, pixels, suffix in zip(("img", "sism", "gt"), whole, ("jpg", "png", "png"), strict=True):
                with replacing(args.output / kind / name / f"{i + 1:03}.{suffix}") as temporary:
                    write_picture(temporary, Image.fromarray(pixels).save, quality=92)
    print(f"{len(classes)} groups, {sum(map(len, classes.values()))} images in {args.output}")
    return 0


def _scaled(image: Path, map_: Path) -> tuple[Pixels, Pixels]:
    pixels = np.asarray(read_image(image, "image", "RGB", behind=(255, 255, 255, 255)))
    size = (round(pixels.shape[1] * HEIGHT / pixels.shape[0]), HEIGHT)
    scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(scaled), np.asarray(grey_image(map_, size))
