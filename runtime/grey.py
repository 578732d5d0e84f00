"""Maps and SISMs as files: PNG of 8-bit grey, with a text that says where they come from."""

import os
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SOFTWARE, MADE_BY = "Software", "icnet"  # the text in every file of ours


def grey_levels(tensor: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A map or a SISM in [0, 1] as its file has it: round(255·value), uint8."""
    return np.rint(tensor * 255).astype(np.uint8)


def save_grey(
    grey: NDArray[np.uint8], path: str | os.PathLike[str] | BinaryIO, notes: Mapping[str, str] | None = None
) -> None:
    """Write uint8 [height, width] as a PNG file, with notes as its text.

    Most of a map is flat: run lengths give files as small as zlib's search for repetitions, in half the time.
    """
    info = PngInfo()
    for key, text in ({SOFTWARE: MADE_BY} | dict(notes or {})).items():
        info.add_text(key, text)
    Image.fromarray(grey).save(path, format="png", compress_type=zlib.Z_RLE, pnginfo=info)


def made_here(source: object) -> bool:
    """Whether a source is a file from `save_grey`: of such a map the values 0 and 1 are real, and nearly nothing.

    Any other image with these values alone is a mask of 0 and 1, whose owner takes 1 for salient.
    """
    return note(source, SOFTWARE) == MADE_BY


def note(source: Any, key: str) -> str | None:
    """A text in a PNG file, as `save_grey` writes it; None if it has none."""
    if not isinstance(source, str | os.PathLike | bytes | bytearray | BytesIO):
        return None
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes | bytearray) else source) as image:
            text = image.info.get(key)
    except Exception:  # whatever is wrong with it, it is not ours
        return None
    return text if isinstance(text, str) else None
