"""The two models of a bank export: images to SIVs, and images with a bank to maps; both in chunks."""

from collections import deque
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Pending
from runtime.bank import Bank
from runtime.contract import ExportKind
from runtime.errors import InputError, ModelError
from runtime.files import joint_digest

MAX_IMAGES = 32  # in one call of a model that takes any number


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
        for backend, kind in ((intra, ExportKind.INTRA), (banked, ExportKind.BANKED)):
            if backend.interface.kind is not kind:
                raise ModelError(
                    f"{backend.path}: a {backend.interface.kind} export, where NAME.{kind} of a bank export is "
                    "expected (icnet export --banked writes both; give them as (NAME.intra, NAME.banked))"
                )
        self.path = banked.path
        self.slots = min(intra.slots, banked.slots)
        self.width = intra.interface.output.shape[1]  # numbers in an image's SIVs
        if self.width != banked.interface.inputs[2].shape[1] or differ(intra.weights_digest, banked.weights_digest):
            raise ModelError(f"{banked.path}: not of the same bank export as {intra.path}; export both at once")
        self.card = banked.card
        # A digest counts only if both files tell it.
        self.weights_digest = intra.weights_digest if banked.weights_digest else None
        self._intra, self._banked = intra, banked
        self._most = most_images(most, intra.largest, banked.largest)
        self._model = self.weights_digest

    @property
    def model(self) -> str:
        """What a bank is known by, see `Bank.model`."""
        if self._model is None:
            self._model = joint_digest(self._intra.path, self._banked.path)
        return self._model

    def sivs(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [N, S] of uint8 [N, 224, 224, 3] and [N, 224, 224], in chunks."""
        return self._in_chunks(self._intra, images, sisms)

    def maps(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8], bank: Bank) -> NDArray[np.float32]:
        """Float32 [N, 224, 224] of images as members of the bank's group, in chunks."""
        return self._in_chunks(self._banked, images, sisms, bank.sivs)

    def group(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [N, 224, 224] of a group on its own, in chunks.

        Raises:
            ModelError: the models can't take chunks of such a group, or a bank of its size; before anything is run.
        """
        self._chunks(self._intra, len(images), 1)
        self._chunks(self._banked, len(images), len(images))
        return self._in_chunks(self._banked, images, sisms, self.sivs(images, sisms))

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

    def _chunks(self, backend: Backend, n: int, bank_size: int) -> list[slice]:
        """Chunks of nearly equal size, all of which the model takes."""
        parts = -(-n // self._most)
        bounds = [n * i // parts for i in range(parts + 1)]
        chunks = [slice(*pair) for pair in pairwise(bounds)]
        for chunk in chunks:
            backend.check_group(chunk.stop - chunk.start, bank_size)
        return chunks

    def _in_chunks(
        self, backend: Backend, images: NDArray[np.uint8], sisms: NDArray[np.uint8], *sivs: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        output = np.empty((len(images), *backend.interface.output.sizes), np.float32)
        in_work: deque[tuple[slice, Pending]] = deque()
        waiting = deque(self._chunks(backend, len(images), len(sivs[0]) if sivs else 1))
        while waiting or in_work:
            if waiting and len(in_work) < backend.slots:
                chunk = waiting.popleft()
                in_work.append((chunk, backend.submit(images[chunk], sisms[chunk], *sivs, last=not waiting)))
                continue
            chunk, pending = in_work.popleft()
            found = pending.result()
            if len(found) != chunk.stop - chunk.start:
                raise ModelError(f"{backend.path}: gave {len(found)} results for {chunk.stop - chunk.start} images")
            output[chunk] = found
        if not np.isfinite(output).all():
            raise ModelError(
                f"{backend.path}: computed NaN or infinite values; its weights may be damaged; export it again from a "
                "whole checkpoint"
            )
        return output


def most_images(*limits: int | None) -> int:
    """The images that go into one call at most, given what limits them."""
    return min((limit for limit in limits if limit is not None), default=MAX_IMAGES)


def differ(one: str | None, other: str | None) -> bool:
    """Whether two digests are known, and different."""
    return one is not None and other is not None and one != other
