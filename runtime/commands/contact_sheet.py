"""Contact sheets: the inputs and maps of a group in one picture."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from runtime.contract import SIZE
from runtime.outputs import refine

COLUMNS = ("image", "SISM", "map", "overlay", "cut-out")
CELL = (200, 150)  # pixels, width and height
GAP = 6
HEADER = 24
TEXT, PAPER = (70, 70, 70), (255, 255, 255)
CHECKERBOARD = np.where((np.indices((SIZE, SIZE)) // 14).sum(0) % 2, 208, 240)[:, :, None]


def contact_sheet(
    images: NDArray[np.uint8],
    sisms: NDArray[np.uint8],
    maps: NDArray[np.float32],
    sizes: Sequence[tuple[int, int]],
    title: str,
    cutouts: bool = False,
) -> Image.Image:
    """One row per image (image | SISM | map | overlay, cut-out); large groups are set in several blocks side by side.

    Args:
        images: RGB uint8 [N, 224, 224, 3].
        sisms: uint8 [N, 224, 224].
        maps: float32 [N, 224, 224] in [0, 1].
        sizes: the images' own (width, height), for their proportions.
        title: the group's name.
        cutouts: whether cut-outs are shown, made at the network's size, before a checkerboard.

    Raises:
        DependencyError: `cutouts`, and OpenCV is not installed.
    """
    n, columns = len(images), COLUMNS if cutouts else COLUMNS[:-1]
    width, height = CELL
    block = len(columns) * (width + GAP) + 2 * GAP
    blocks = max(1, math.ceil(math.sqrt(n * (height + GAP) / block / 1.5)))  # about as wide as high
    rows = math.ceil(n / blocks)
    top = 2 * HEADER
    sheet = Image.new("RGB", (block * math.ceil(n / rows), top + rows * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    draw.text((2 * GAP, HEADER / 2), f"{title}: {n} image{'s' * (n != 1)}", TEXT, font, anchor="lm")
    for i in range(n):
        left, y = block * (i // rows) + 2 * GAP, top + (i % rows) * (height + GAP)
        for column, picture in enumerate(_row(images[i], sisms[i], maps[i], cutouts)):
            x = left + column * (width + GAP)
            if i % rows == 0:
                draw.text((x + width / 2, 1.5 * HEADER), columns[column], TEXT, font, anchor="mm")
            scale = min(width / sizes[i][0], height / sizes[i][1])
            size = max(1, round(sizes[i][0] * scale)), max(1, round(sizes[i][1] * scale))
            resized = picture.resize(size, Image.Resampling.BICUBIC)
            sheet.paste(resized, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))
    return sheet


def _row(
    image: NDArray[np.uint8], sism: NDArray[np.uint8], map_: NDArray[np.float32], cutout: bool
) -> list[Image.Image]:
    weight = map_[:, :, None]
    grey = image.mean(2, keepdims=True) * 0.5 + 96  # the background, faded
    overlay = image * weight + grey * (1 - weight)
    tensors = [image, sism, map_ * 255, overlay]
    if cutout:
        alpha = refine(map_, image)[:, :, None] / 255
        tensors.append(image * alpha + CHECKERBOARD * (1 - alpha))
    return [Image.fromarray(np.rint(tensor).astype(np.uint8)) for tensor in tensors]
