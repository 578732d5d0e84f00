"""Banks: the single-image vectors (SIVs) of a group's images, which are all that any other image needs of the group.

With a bank each image is computed on its own. So a group of any size is run in chunks, with the same result; and new
images are compared with a bank that was kept.
"""

import hashlib
import os
import zipfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Pending
from runtime.errors import InputError, ModelError
from runtime.files import digest, replacing

VERSION = 1  # of the file's layout
MAX_IMAGES = 32  # in one call of a model that takes any number


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
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, sivs=self.sivs, model=np.array(self.model), version=np.array(VERSION))

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


class BankModels:
    """The two models of a bank export.

    Args:
        intra: images to SIVs.
        banked: images and SIVs to maps.
        most: images in one call; None for what both take, and MAX_IMAGES if they take any number.

    Raises:
        ModelError: they are not that, or not of one export.
    """

    def __init__(self, intra: Backend, banked: Backend, most: int | None = None) -> None:
        for backend, kind in ((intra, "intra"), (banked, "banked")):
            if backend.interface.kind != kind:
                raise ModelError(
                    f"{backend.path}: a {backend.interface.kind} export, where NAME.{kind} of a bank export is "
                    "expected (icnet export --banked writes both; give them as (NAME.intra, NAME.banked))"
                )
        self.path = banked.path
        self.slots = min(intra.slots, banked.slots)
        self.width = intra.interface.output.shape[1]  # numbers in an image's SIVs
        if self.width != banked.interface.inputs[2].shape[1] or differ(intra.weights, banked.weights):
            raise ModelError(f"{banked.path}: not of the same bank export as {intra.path}; export both at once")
        self.weights = intra.weights if banked.weights else None  # both tell, or none is believed
        self._intra, self._banked = intra, banked
        self._most = most_images(most, intra.largest, banked.largest)
        self._model = self.weights

    @property
    def model(self) -> str:
        """What a bank is known by, see `Bank.model`."""
        if self._model is None:
            both = digest(self._intra.path) + digest(self._banked.path)
            self._model = hashlib.sha256(both.encode()).hexdigest()
        return self._model

    def sivs(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [N, S] of uint8 [N, 224, 224, 3] and [N, 224, 224], in chunks."""
        return self._in_chunks(self._intra, images, sisms)

    def maps(
        self, images: NDArray[np.uint8], sisms: NDArray[np.uint8], bank: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Float32 [N, 224, 224] of images as members of the bank's group, in chunks."""
        return self._in_chunks(self._banked, images, sisms, bank)

    def group(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [N, 224, 224] of a group on its own, in chunks.

        Raises:
            ModelError: the models can't take chunks of such a group, or a bank of its size; before anything is run.
        """
        self._chunks(self._intra, len(images), 1)
        self._chunks(self._banked, len(images), len(images))
        return self.maps(images, sisms, self.sivs(images, sisms))

    def check(self, bank: Bank) -> None:
        """Raise InputError unless these models can use a bank."""
        if not isinstance(bank, Bank):
            raise InputError(f"bank: expected a Bank, got {type(bank).__name__}")
        if len(bank) == 0:
            raise InputError(f"{bank.name}: empty; a bank needs the SIVs of one image at least")
        if bank.sivs.shape[1] != self.width:
            raise InputError(
                f"{bank.name}: of another model, with {bank.sivs.shape[1]} numbers per image where {self.path} has "
                f"{self.width} (1280 times the width)"
            )
        if bank.model != self.model:
            raise InputError(
                f"{bank.name}: of another model ({bank.model[:12]}…) than {self.path} ({self.model[:12]}…); make it "
                "again with icnet bank"
            )

    def _chunks(self, backend: Backend, n: int, bank: int) -> list[slice]:
        """Chunks of nearly equal size, all of which the model takes."""
        parts = -(-n // self._most)
        bounds = [n * i // parts for i in range(parts + 1)]
        chunks = [slice(*pair) for pair in pairwise(bounds)]
        for chunk in chunks:
            backend.check_group(chunk.stop - chunk.start, bank)
        return chunks

    def _in_chunks(
        self, backend: Backend, images: NDArray[np.uint8], sisms: NDArray[np.uint8], *bank: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        output = np.empty((len(images), *backend.interface.output.sizes), np.float32)
        in_work: deque[tuple[slice, Pending]] = deque()
        waiting = deque(self._chunks(backend, len(images), len(bank[0]) if bank else 1))
        while waiting or in_work:
            if waiting and len(in_work) < backend.slots:
                chunk = waiting.popleft()
                in_work.append((chunk, backend.submit(images[chunk], sisms[chunk], *bank, last=not waiting)))
                continue
            chunk, pending = in_work.popleft()
            found = pending.result()
            if len(found) != chunk.stop - chunk.start:
                raise ModelError(f"{backend.path}: gave {len(found)} results for {chunk.stop - chunk.start} images")
            output[chunk] = found
        if not np.isfinite(output).all():
            raise ModelError(f"{backend.path}: computed NaN or infinite values; its weights may be damaged")
        return output


def most_images(*limits: int | None) -> int:
    """The images that go into one call at most, given what limits them."""
    return min((limit for limit in limits if limit is not None), default=MAX_IMAGES)


def differ(one: str | None, other: str | None) -> bool:
    """Whether two digests are known, and different."""
    return one is not None and other is not None and one != other
