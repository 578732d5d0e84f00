"""`Bank`: the single-image vectors (SIVs) of a group's images, which are all that another image needs of the group.

With a bank each image is computed on its own. So a group of any size is run in chunks, with the same result, and new
images are compared with a bank that was kept. `bank_models.py` has the models that make and take banks.
"""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.files import encoded, replacing, write_bytes

VERSION = 1  # of the file's layout


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
        InputError: `sivs` is no such array.
    """

    sivs: NDArray[np.float32]
    model: str
    name: str = "the bank"

    def __post_init__(self) -> None:
        if not (isinstance(self.sivs, np.ndarray) and self.sivs.dtype == np.float32 and self.sivs.ndim == 2):
            raise InputError(f"{self.name}: SIVs must be an array float32 [M, 1280·width]")
        if not np.isfinite(self.sivs).all():
            raise InputError(f"{self.name}: holds NaN or infinite values")

    def __len__(self) -> int:
        """The number of images in it."""
        return len(self.sivs)

    def __getitem__(self, rows: int | slice | Sequence[int] | NDArray[Any]) -> "Bank":
        """The bank of some of its images: an index, several, a slice, or a bool per image."""
        return Bank(np.atleast_2d(self.sivs[rows]), self.model, self.name)

    def __add__(self, other: "Bank") -> "Bank":
        """The bank of both's images.

        Raises:
            InputError: they are of different models.
        """
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
            InputError: it can't be read, or is no bank, or of another version of the layout.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                version, model, sivs = int(file["version"]), str(file["model"]), file["sivs"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"{path}: can't be read: {error.strerror}") from error
            raise InputError(f"{path}: not a bank: expected what icnet bank or Bank.save wrote") from error
        if version != VERSION:
            raise InputError(f"{path}: a bank of layout {version}, expected {VERSION}: make it again with icnet bank")
        return cls(sivs, model, os.fspath(path))
