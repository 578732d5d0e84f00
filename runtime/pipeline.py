"""The models of a `Predictor`: which of them takes a group, what it refuses, and its maps, checked.

All that is done to pixels is done in the pool of `Workers`. The caller's thread hands tensors to the engine.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Pending
from runtime.backends.onnx import Finished
from runtime.bank import Bank
from runtime.bank_models import BankModels
from runtime.contract import ExportKind
from runtime.detector import Detector, Undetected, finished, network_sism
from runtime.errors import ICNetError, InputError, ModelError
from runtime.packing import Packer, Tensors
from runtime.preprocess import GroupPixels, ImageSource, Pixels, reads, stack
from runtime.stream import Detected, Stream, Task
from runtime.threads import Workers

T = TypeVar("T")
Maps = NDArray[np.float32]
ONE = np.float32(1).view(np.uint32)  # floats from 0 on have the order of their bits; NaN and negative ones have larger


class Pipeline:
    """The models of a `Predictor`, and the way of groups through them. Safe from several threads.

    Args:
        path: what messages call the model.
        workers: the threads for pixels.
        backend: a plain or packed export; None if there are the two files of a bank export only.
        banks: the two files of a bank export, if there are any.
        most: the number of images in a packed call, and of the largest group that `backend` gets if there are `banks`.
        delay: packed exports: seconds that a group waits for those of other threads.
        detector: makes the SISMs of images that have none; None for built-in ones.
    """

    def __init__(
        self,
        path: str,
        workers: Workers,
        backend: Backend | None,
        banks: BankModels | None,
        most: int,
        delay: float,
        detector: Detector | None = None,
    ) -> None:
        self.path, self.workers, self._detector = path, workers, detector
        self._backend, self._banks, self._most = backend, banks, most
        packed = backend is not None and backend.interface.kind is ExportKind.PACKED
        self._packer = Packer(self._run, most, backend.slots, delay) if packed and backend is not None else None
        self._closed = False

    @property
    def packed(self) -> bool:
        """Whether the model takes several groups in one call."""
        return self._packer is not None

    def reads(
        self, images: Sequence[ImageSource], sisms: Sequence[ImageSource | None] | None, kept: bool = False
    ) -> list[Callable[[], Pixels | Undetected]]:
        """A call per image that reads it and its SISM, once the group is known to fit the model.

        Args:
            images: paths, arrays or PIL images.
            sisms: likewise, one per image; None for the detector's, of all images or of one.
            kept: the images are for a bank, or are compared with one, so any number will do.

        Raises:
            InputError: no images, or counts that differ.
            ModelError: the model does not take groups of this size.
        """
        self.check_group(len(images), len(images) if sisms is None else len(sisms), kept)
        calls: list[Callable[[], Pixels | Undetected]] = [*reads(images, sisms)]
        if self._detector is not None:
            for i, image in enumerate(images):
                if sisms is None or sisms[i] is None:
                    calls[i] = partial(self._detector.look, image, f"images[{i}]")
        return [partial(self._while_open, call) for call in calls]

    def _while_open(self, call: Callable[[], T]) -> T:
        self.check_open()
        return call()

    def complete(self, read: Sequence[Pixels | Undetected], detected: Detected | None = None) -> GroupPixels:
        """A group's pixels, after the detector has made the SISMs that are missing.

        Args:
            read: the results of the calls from `reads`.
            detected: as `Task` has it.

        Raises:
            ModelError: the detector fails.
        """
        unseen = [(i, image) for i, image in enumerate(read) if isinstance(image, Undetected)]
        pixels = {i: image for i, image in enumerate(read) if isinstance(image, Pixels)}
        if unseen and self._detector is not None:
            self.check_open()
            maps = self._detector([image for _, image in unseen])

            def finish(i: int, image: Undetected, tensor: Maps) -> Pixels:
                sism = finished(image, tensor)
                if detected is not None:
                    detected(i, sism)
                return Pixels(image.image, network_sism(sism), image.size)

            calls = [partial(finish, *one, tensor) for one, tensor in zip(unseen, maps, strict=True)]
            pixels |= zip([i for i, _ in unseen], self.workers.run(calls), strict=True)
        return stack([pixels[i] for i in range(len(read))])

    def read(
        self, images: Sequence[ImageSource], sisms: Sequence[ImageSource | None] | None, kept: bool = False
    ) -> GroupPixels:
        """A group's pixels; arguments and errors are those of `reads`, `read_pixels` and `complete`."""
        return self.complete(self.workers.run(self.reads(images, sisms, kept)))

    def maps(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8], bank: Bank | None = None) -> Maps:
        """The maps, float32 [N, 224, 224] in [0, 1], of a group on its own or against a bank.

        Raises:
            ModelError: the model fails.
        """
        if bank is None and self._packer is not None and not self._in_chunks(len(images)):
            return self.checked(self._packer(images, sisms))
        return self.checked(self._run([(images, sisms)], bank))

    def stream(
        self, tasks: Iterable[Task[T] | ICNetError], *, ahead: int = 4, bank: Bank | None = None, pack: bool = True
    ) -> Iterator[list[T] | ICNetError]:
        """The outcomes of many groups, in order.

        Args:
            tasks: the groups; read as far as needed, for a packed model until one call is full. A group that came to
                nothing may be represented by its error, which becomes its outcome.
            ahead: groups that are read before their turn.
            bank: what the images are compared with; None for their own group.
            pack: give a packed model several groups at once.

        Yields:
            The results of the task's `after` calls, or what kept the group from them.

        Raises:
            Exception: what `tasks` raises, after the outcomes of the groups before it.
            InputError: the bank is empty or of another model.
            ModelError: there is a bank but no bank export.
        """
        self.check_open()
        if bank is not None:
            self.bank_models().check(bank)
        full = self._most if pack and bank is None and self._packer is not None else 0
        slots = 1 if bank is not None or self._backend is None else self._backend.slots
        return iter(Stream(self, tasks, max(ahead, 1), slots, full, bank))

    def start(self, groups: Sequence[Tensors], bank: Bank | None = None) -> Pending:
        """Start on groups in one call; only a packed model takes several.

        Raises:
            ModelError: the model can't take them, or fails.
        """
        self.check_open()
        images, sisms = groups[0] if len(groups) == 1 else map(np.concatenate, zip(*groups, strict=True))
        if bank is not None:
            return Finished(self.bank_models().maps(images, sisms, bank))
        if self._banks is not None and self._in_chunks(len(images)):
            return Finished(self._banks.group(images, sisms))
        assert self._backend is not None
        self._backend.check_group(len(images))
        if self._packer is None:
            return self._backend.submit(images, sisms)
        labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group[0]) for group in groups])
        return self._backend.submit(images, sisms, labels)

    def finish(self, pending: Pending, sizes: Sequence[int]) -> list[Maps]:
        """Wait for a call: the maps of each of its groups, which have so many images.

        Raises:
            ModelError: the model fails, or does not give a map per image.
        """
        maps, images = pending.result(), sum(sizes)
        if len(maps) != images:
            raise ModelError(
                f"{self.path}: the model gave {len(maps)} maps for {images} images; it is not an ICNet export"
            )
        return np.split(maps, np.cumsum(sizes)[:-1])

    def _run(self, groups: Sequence[Tensors], bank: Bank | None = None) -> Maps:
        """The maps of groups in one call, one group after the other."""
        (maps,) = self.finish(self.start(groups, bank), [sum(len(group[0]) for group in groups)])
        return maps

    def checked(self, maps: Maps) -> Maps:
        """The maps of a group, if they can be maps at all."""
        if (
            maps.size and maps.view(np.uint32).max() <= ONE
        ):  # one pass; of the sign, infinity and NaN the bits are larger
            return maps
        low, high = maps.min(), maps.max()  # NaN is carried through both
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError(f"{self.path}: the model computed NaN or infinite values; its weights may be damaged")
        if low < 0 or high > 1:
            raise ModelError(f"{self.path}: the model's maps leave [0, 1]: [{low:g}, {high:g}]")
        return maps

    def _in_chunks(self, images: int) -> bool:
        """Whether a group of so many images goes through the bank export."""
        return self._banks is not None and (self._backend is None or images > self._most)

    def check_group(self, images: int, sisms: int, kept: bool = False) -> None:
        """Raise unless a group of this size can be run; arguments and errors are those of `reads`."""
        self.check_open()
        if images != sisms:
            raise InputError(f"{images} images but {sisms} SISMs: every image needs its own")
        if images == 0:
            raise InputError("no images: a group has at least one")
        if kept or self._backend is None or self._in_chunks(images):
            return
        try:
            self._backend.check_group(images)
        except ModelError as error:
            if images <= (self._backend.largest or images):
                raise
            raise ModelError(
                f"{error}; or run it in chunks, with the two files of a bank export: icnet export --banked, then "
                "Predictor(MODEL, bank_export=(NAME.intra, NAME.banked))"
            ) from None

    def bank_models(self) -> BankModels:
        """The bank export.

        Raises:
            ModelError: there is none.
        """
        self.check_open()
        if self._banks is None:
            raise ModelError(
                f"{self.path}: banks take the two files of a bank export: icnet export --banked, then "
                "Predictor(bank_export=(NAME.intra.onnx, NAME.banked.onnx))"
            )
        return self._banks

    def check_open(self) -> None:
        """Raise ICNetError if the pipeline is closed."""
        if self._closed:
            raise ICNetError(f"{self.path}: this Predictor is closed")

    def close(self) -> None:
        """Refuse groups, also those that wait. The Predictor closes the models and the workers, which it opened."""
        self._closed = True
        if self._packer is not None:
            self._packer.close(ICNetError(f"{self.path}: this Predictor is closed"))
