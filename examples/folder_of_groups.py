"""Maps for a folder of groups: DATA/img/GROUP/NAME.jpg and DATA/sism/GROUP/NAME.png to OUTPUT/GROUP/NAME.png.

python examples/folder_of_groups.py icnet.onnx DATA OUTPUT
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import Predictor


def main(model: Path, data: Path, output: Path) -> None:
    """Write an 8-bit map of every image. Groups are decoded ahead of the engine, and come out in order."""
    groups = [sorted(folder.iterdir()) for folder in sorted((data / "img").iterdir())]
    sisms = [[data / "sism" / image.parent.name / f"{image.stem}.png" for image in images] for images in groups]
    with Predictor(model) as predictor:
        for images, maps in zip(groups, predictor.predict_groups(zip(groups, sisms, strict=True)), strict=True):
            folder = output / images[0].parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for image, found in zip(images, maps, strict=True):
                Image.fromarray(np.rint(found * 255).astype(np.uint8)).save(folder / f"{image.stem}.png")
            print(f"{folder}: {len(maps)} maps")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
