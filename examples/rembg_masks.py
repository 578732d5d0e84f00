"""Maps for a folder of photographs of one group, with the masks that rembg made of them as SISMs.

rembg p -om PHOTOS MASKS
python examples/rembg_masks.py icnet.onnx PHOTOS MASKS OUTPUT

rembg names the mask of NAME.jpg NAME.png, upright and of the photograph's size. It passes over what it can't read, and
puts the masks of subfolders into one folder: run it once per group.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runtime import Predictor


def mask_of(photo: Path, masks: Path) -> Path:
    """The mask that rembg made of a photograph; ends the program if there is none, or if it is another photograph's."""
    mask = masks / f"{photo.stem}.png"
    if not mask.is_file():
        sys.exit(f"{photo}: no mask {mask}; rembg p -om {photo.parent} {masks} makes those that are missing")
    with Image.open(photo) as image, Image.open(mask) as found:
        size = ImageOps.exif_transpose(image).size
        if found.size != size or found.mode != "L":
            sys.exit(
                f"{mask}: {found.mode}, {found.size}: not the mask of {photo} {size}; delete it and run rembg p -om"
            )
    return mask


def main(model: Path, photos: Path, masks: Path, output: Path) -> None:
    """Write an 8-bit map of every photograph."""
    images = sorted(path for path in photos.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
    sisms = [mask_of(image, masks) for image in images]
    with Predictor(model) as predictor:
        maps = predictor(images, sisms)
    output.mkdir(parents=True, exist_ok=True)
    for image, found in zip(images, maps, strict=True):
        Image.fromarray(np.rint(found * 255).astype(np.uint8)).save(output / f"{image.stem}.png")
    print(f"{output}: {len(maps)} maps")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
