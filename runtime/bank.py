"""`Bank`: the single-image vectors (SIVs) of a group's images, which are all that another image needs of the group.

With a bank each image is computed on its own. So a group of any size is run in chunks, with the same result, and new
images are compared with a bank that was kept. `bank_models.py` has the models that make and take banks.
"""

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.files import encoded, replacing, write_bytes

VERSION = 1  # of the file's layout
LARGEST = 1.01  # SIVs are parts of unit vectors; a little more, for rounding
MOST_BYTES_PER_BYTE = 20  # of an archive that somebody has compressed; a row of SIVs hardly gets smaller


@dataclass(frozen=True, eq=False)
class Bank:
    """The SIVs of a group's images: one row per image, in their order. Adding and removing images is done by rows.

        bank = predictor.bank(images, sisms)
        bank = bank[1:] + predictor.bank(more_images, more_sisms)  # the first image out, others in
        bank.save("mugs.npz")

    Attributes:
        sivs: float32 [M, 1280·width].
        model: what made them: the digest of the network's weights if its files tell it, and then any export of that
            network takes the bank, whatever its precision; else a digest of the two files.
        name: what messages call it.

    Raises:
        InputError: `sivs` is no such array, or holds what is no part of a unit vector, or `model` is not a digest.
    """

    sivs: NDArray[np.float32]
    model: str
    name: str = "the bank"

    def __post_init__(self) -> None:
        if not (isinstance(self.sivs, np.ndarray) and self.sivs.dtype == np.float32 and self.sivs.ndim == 2):
            raise InputError(f"{self.name}: SIVs must be an array float32 [M, 1280·width]")
        if not (isinstance(self.model, str) and self.model):
            raise InputError(f"{self.name}: model={self.model!r}: expected the digest of a network's weights")
        if not np.isfinite(self.sivs).all():
            raise InputError(f"{self.name}: holds NaN or infinite values")
        if self.sivs.size and (largest := max(self.sivs.max(), -self.sivs.min())) > LARGEST:
            raise InputError(
                f"{self.name}: holds {largest:g}, where SIVs are in [-1, 1]; it may be damaged: make it again"
            )

    def __len__(self) -> int:
        """The number of images in it."""
        return len(self.sivs)

    def __getitem__(self, rows: int | slice | Sequence[int] | NDArray[Any]) -> "Bank":
        """The bank of some of its images: an index, several, a slice, or a bool per image."""
        return Bank(np.atleast_2d(self.sivs[rows]), self.model, self.name)

    def __add__(self, other: "Bank") -> "Bank":
        """The bank of both's images.

        Raises:
            InputError: they are of different models, or `other` is no bank.
        """
        if not isinstance(other, Bank):
            raise InputError(f"{self.name}: only a Bank can be joined to it, got {type(other).__name__}")
        if self.model != other.model or self.sivs.shape[1] != other.sivs.shape[1]:
            raise InputError(f"{self.name} and {other.name} are of different models and can't be joined")
        return Bank(np.concatenate([self.sivs, other.sivs]), self.model, self.name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a NumPy archive with the arrays `sivs`, `model` and `version`.

        Raises:
            OutputError: it can't be written.
        """
        arrays: dict[str, Any] = {"sivs": self.sivs, "model": np.array(self.model), "version": np.array(VERSION)}
        with replacing(path) as temporary:
            write_bytes(temporary, encoded(lambda file: np.savez(file, **arrays)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Bank":
        """Read what `save` wrote.

        Raises:
            InputError: it can't be read, or is no bank, or of another version of the layout. No more memory is taken
                than the file's size allows for, whatever it claims to hold.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"bank: expected a path, got {type(path).__name__}")
        try:
            file = Path(path)
            if file.exists() and not file.is_file() and not file.is_dir():  # reading a pipe would wait for ever
                raise InputError(f"{path}: not a regular file")
            with file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
                most = MOST_BYTES_PER_BYTE * file.stat().st_size
                version, model = int(_array(archive, "version", most)), str(_array(archive, "model", most))
                sivs = _array(archive, "sivs", most)
        except InputError:
            raise
        except Exception as error:  # zipfile and its decompressors raise almost anything
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"{path}: can't be read: {error.strerror}") from error
            raise InputError(f"{path}: not a bank: expected what icnet bank or Bank.save wrote") from error
        if version != VERSION:
            raise InputError(f"{path}: a bank of layout {version}, expected {VERSION}: make it again with icnet bank")
        return cls(sivs, model, os.fspath(path))


def _array(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """An array of a NumPy archive; ValueError, or what zipfile raises, unless it is whole and of at most `most` bytes.

    `np.load` would take the memory that a header asks for, and decompress without bounds.
    """
    with archive.open(f"{name}.npy") as file:
        method = archive.getinfo(f"{name}.npy").compress_type
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}: another layout")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or size > most:
            raise ValueError(f"{name}: {dtype} {shape}")
        content = file.read(size + 1)  # with one more, so that the end is seen, and there the checksum
        if len(content) != size:
            raise ValueError(f"{name}: {len(content)} bytes, expected {size}")
    return np.ndarray(shape, dtype, content, order="F" if fortran else "C").copy()
