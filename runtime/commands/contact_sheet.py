"""Contact sheets: the inputs and maps of a group in one picture."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from runtime.contract import SIZE
from runtime.grey import grey_levels
from runtime.outputs import refine

COLUMNS = ("image", "SISM", "map", "overlay", "cut-out")
CELL = (200, 150)  # pixels, width and height
GAP = 6
HEADER = 24
TEXT, PAPER = (70, 70, 70), (255, 255, 255)
CHECKERBOARD = Image.fromarray(
    np.where((np.indices((SIZE, SIZE)) // 14).sum(0) % 2, np.uint8(208), np.uint8(240))
).convert("RGB")


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
    columns = COLUMNS if cutouts else COLUMNS[:-1]
    rows = (_row(*tensors, cutouts) for tensors in zip(images, sisms, maps, strict=True))
    return sheet(rows, columns, sizes, f"{title}: {len(images)} image{'s' * (len(images) != 1)}")


def sheet(
    rows: Iterable[Sequence[Image.Image]],
    columns: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    title: str,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Rows of pictures under headed columns; many rows are set in several blocks side by side.

    Args:
        rows: a picture for each of `columns`; one row is in memory at a time.
        columns: their headings.
        sizes: (width, height) of each row's image, for the proportions of its pictures.
        title: stands above all.
        captions: a line below each row; none for no lines.
    """
    n, (width, height) = len(sizes), CELL
    block = len(columns) * (width + GAP) + 2 * GAP
    step = height + GAP + (HEADER if captions else 0)
    blocks = max(1, math.ceil(math.sqrt(n * step / block / 1.5)))  # about as wide as high
    in_block = math.ceil(n / blocks)
    top = 2 * HEADER
    picture = Image.new("RGB", (block * math.ceil(n / in_block), top + in_block * step + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    draw.text((2 * GAP, HEADER / 2), title, TEXT, font, anchor="lm")
    for i, row in enumerate(rows):
        left, y = block * (i // in_block) + 2 * GAP, top + (i % in_block) * step
        for column, cell in enumerate(row):
            x = left + column * (width + GAP)
            if i % in_block == 0:
                draw.text((x + width / 2, 1.5 * HEADER), columns[column], TEXT, font, anchor="mm")
            scale = min(width / sizes[i][0], height / sizes[i][1])
            size = max(1, round(sizes[i][0] * scale)), max(1, round(sizes[i][1] * scale))
            resized = cell.resize(size, Image.Resampling.BICUBIC)
            picture.paste(resized, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))
        if captions:
            draw.text((left, y + height + HEADER / 2), captions[i], TEXT, font, anchor="lm")
    return picture


def _row(
    image: NDArray[np.uint8], sism: NDArray[np.uint8], map_: NDArray[np.float32], cutout: bool
) -> list[Image.Image]:
    picture, level = Image.fromarray(image), Image.fromarray(grey_levels(map_))
    faded = Image.blend(picture.convert("L"), Image.new("L", picture.size, 192), 0.5)  # the background
    pictures = [picture, Image.fromarray(sism), level, Image.composite(picture, faded.convert("RGB"), level)]
    if cutout:
        alpha = Image.fromarray(refine(map_, image))
        pictures.append(Image.composite(picture, CHECKERBOARD, alpha))
    return pictures
