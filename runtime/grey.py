"""Maps and SISMs as files: PNG of 8-bit grey, with a text that says where they come from."""

import os
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UP = 2  # the filter's number
SOFTWARE, MADE_BY = "Software", "icnet"  # the text in every file of ours


def grey_levels(tensor: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A map or a SISM in [0, 1] as its file has it: round(255·value), uint8."""
    return np.rint(tensor * 255).astype(np.uint8)


def save_grey(
    grey: NDArray[np.uint8], path: str | os.PathLike[str] | BinaryIO, notes: Mapping[str, str] | None = None
) -> None:
    """Write uint8 [height, width] as a PNG file, with notes as its text.

    Most of a map is flat: differences to the row above (PNG specification, section 9.2), in run lengths. Pillow, which
    tries five filters on every row, takes twice as long for files that are little smaller.
    """
    rows = np.empty((grey.shape[0], 1 + grey.shape[1]), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = grey[0]
    np.subtract(grey[1:], grey[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    info = PngInfo()
    for key, text in ({SOFTWARE: MADE_BY} | dict(notes or {})).items():
        info.add_text(key, text)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)  # 8 bits, grey
    texts = [(chunk[0], chunk[1]) for chunk in info.chunks]
    chunks = [(b"IHDR", header), *texts, (b"IDAT", packer.compress(rows.data) + packer.flush()), (b"IEND", b"")]
    content = SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in chunks
    )
    if isinstance(path, str | os.PathLike):
        Path(path).write_bytes(content)
    else:
        path.write(content)


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
